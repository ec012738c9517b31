/* SPDX-License-Identifier: Apache-2.0
 *
 * Where an image may have data, with an image that is a table of extents in place of librbd's.
 */
#include "rbd_holes.h"

#include "harness.h"

#define KIB 1024ull
#define GIB (1ull << 30)
#define GRAIN (64 * KIB)
#define WINDOW (4 * GIB)
#define BYTES (2 * WINDOW + GIB)

static struct image {
    struct {
        uint64_t offset, length;
        int exists;
    } extents[4];
    int count;
    int asked; /* how often */
    int result;
    struct rbd_holes *written_meanwhile; /* the guest writes there while the image is looked at */
} image;

int rbd_diff_iterate2(rbd_image_t handle, const char *from, uint64_t at, uint64_t length, uint8_t parent,
                      uint8_t whole_objects, int (*tell)(uint64_t, size_t, int, void *), void *arg)
{
    CHECK(handle == &image && from == NULL && parent == 1 && whole_objects == 0);
    image.asked++;
    if (image.written_meanwhile)
        rbd_holes_write(image.written_meanwhile, at, GRAIN);
    for (int i = 0; i < image.count; i++)
        if (image.extents[i].offset >= at && image.extents[i].offset < at + length)
            CHECK(tell(image.extents[i].offset, image.extents[i].length, image.extents[i].exists, arg) == 0);
    return image.result;
}

static struct rbd_holes fresh(void)
{
    struct rbd_holes h;
    image = (struct image){.count = 0};
    CHECK(rbd_holes_init(&h, BYTES));
    return h;
}

static void check_look(struct rbd_holes *h, uint64_t offset, uint64_t length, uint64_t data_at, uint64_t data_end)
{
    uint64_t at, end;
    rbd_holes_look(h, &image, offset, length, &at, &end);
    CHECK(at == data_at);
    CHECK(end == data_end);
}

static void test_what_the_image_tells(void)
{
    struct rbd_holes h = fresh();
    image.extents[0].offset = 3 * GRAIN + 5; /* no whole grains: both count */
    image.extents[0].length = GRAIN;
    image.extents[0].exists = 1;
    image.extents[1].offset = 9 * GRAIN;
    image.extents[1].length = GRAIN;
    image.extents[1].exists = 0; /* was there once */
    image.count = 2;
    check_look(&h, 0, 16 * GRAIN, 3 * GRAIN, 5 * GRAIN);
    check_look(&h, 4 * GRAIN, 512, 4 * GRAIN, 4 * GRAIN + 512);
    check_look(&h, 5 * GRAIN, 11 * GRAIN, 16 * GRAIN, 16 * GRAIN); /* a hole: as far as was asked */
    CHECK(image.asked == 1);
    rbd_holes_free(&h);
}

static void test_each_window_is_asked_about_once(void)
{
    struct rbd_holes h = fresh();
    check_look(&h, WINDOW - GRAIN, 2 * GRAIN, WINDOW + GRAIN, WINDOW + GRAIN);
    CHECK(image.asked == 2);
    check_look(&h, 2 * WINDOW, GIB, BYTES, BYTES);
    check_look(&h, 0, GRAIN, GRAIN, GRAIN);
    CHECK(image.asked == 3);
    rbd_holes_free(&h);
}

static void test_what_is_written_is_data_from_then_on(void)
{
    struct rbd_holes h = fresh();
    rbd_holes_write(&h, 7 * GRAIN - 512, 1024); /* before anybody has asked */
    check_look(&h, 0, 16 * GRAIN, 6 * GRAIN, 8 * GRAIN);
    rbd_holes_write(&h, 2 * GRAIN, 512);
    check_look(&h, 0, 16 * GRAIN, 2 * GRAIN, 3 * GRAIN);
    image.written_meanwhile = &h;
    check_look(&h, WINDOW, 4 * GRAIN, WINDOW, WINDOW + GRAIN);
    rbd_holes_write(&h, BYTES - 512, 512);
    check_look(&h, BYTES - GRAIN, GRAIN, BYTES - GRAIN, BYTES);
    rbd_holes_free(&h);
}

static void test_what_cannot_be_told_is_data(void)
{
    struct rbd_holes h = fresh();
    check_look(&h, BYTES - GRAIN, 2 * GRAIN, BYTES - GRAIN, BYTES + GRAIN); /* the image has grown */
    rbd_holes_write(&h, BYTES, GRAIN);
    image.result = -110;
    check_look(&h, 0, 16 * GRAIN, 0, 16 * GRAIN);
    check_look(&h, WINDOW, GRAIN, WINDOW, WINDOW + GRAIN);
    CHECK(image.asked == 2); /* in vain once, and never again */
    rbd_holes_free(&h);
}

int main(void)
{
    test("what the image tells", test_what_the_image_tells);
    test("each window is asked about once", test_each_window_is_asked_about_once);
    test("what is written is data from then on", test_what_is_written_is_data_from_then_on);
    test("what cannot be told is data", test_what_cannot_be_told_is_data);
    return tests_end();
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * A disk of an NBD server, with its own thread, against a real server (nbdkit over a file): at work, losing it, held
 * for another connection, cut off, given up. Whoever looks after its connection is a thread of its own, as in the
 * control plane. For the sanitizers above all: tests/network has the outcomes.
 */
#include <signal.h>
#include <sys/wait.h>

#include "nbd_connection.h"
#include "remote_rig.h"

#define CONNECT_MS 10000

static char folder[] = "/tmp/vhs-nbd-XXXXXX", socket_path[64], image_path[64], uri[128];
static pid_t server;

/* ---- the server ---------------------------------------------------------------- */

static void start_server(void)
{
    unlink(socket_path);
    server = fork();
    CHECK(server >= 0);
    if (server == 0) {
        execlp("nbdkit", "nbdkit", "--foreground", "--exit-with-parent", "-U", socket_path, "file", image_path, NULL);
        _exit(127);
    }
}

static void kill_server(void)
{
    CHECK(kill(server, SIGKILL) == 0);
    CHECK(waitpid(server, NULL, 0) == server);
}

static vs_nbd *connected(uint32_t connections)
{
    struct vs_nbd_export export;
    char why[VS_NBD_WHY_BYTES];
    vs_nbd *nbd = NULL;
    for (int tries = 0; !nbd && tries < 3000; tries++) {
        nbd = vs_nbd_connect(uri, connections, CONNECT_MS, &export, why);
        if (!nbd)
            usleep(10000); /* it does not listen yet */
    }
    if (!nbd)
        printf("# %s\n", why);
    CHECK(nbd);
    CHECK_EQUAL(export.bytes, RIG_BYTES);
    return nbd;
}

/* ---- who looks after the connection ------------------------------------------------ */

static struct keeper {
    pthread_t thread;
    vs_nbd *nbd;
    uint32_t connections;
    enum { LET_GO, BRING_BACK, GIVE_UP } task;
    enum vs_nbd_state seen; /* the first loss */
} keeper;

static void *look_after(void *arg)
{
    char why[VS_NBD_WHY_BYTES];
    enum vs_nbd_state state = keeper.seen = vs_nbd_await_loss(keeper.nbd, why);
    (void)arg;
    if (state == VS_NBD_HELD || state == VS_NBD_UNCERTAIN) {
        if (keeper.task == BRING_BACK) {
            vs_nbd *fresh = connected(keeper.connections);
            CHECK(vs_nbd_is_held(keeper.nbd) && vs_nbd_replace(keeper.nbd, fresh));
            vs_nbd_close(fresh);
            vs_nbd_release(fresh);
            state = vs_nbd_await_loss(keeper.nbd, why);
        } else {
            vs_nbd_give_up(keeper.nbd);
        }
    }
    vs_nbd_release(keeper.nbd);
    return NULL;
}

static void open_disk(uint32_t connections, int task)
{
    keeper.nbd = connected(connections);
    keeper.connections = connections;
    keeper.task = task;
    rig_open(vs_nbd_disk(keeper.nbd));
    CHECK(pthread_create(&keeper.thread, NULL, look_after, NULL) == 0);
}

static void close_disk(void)
{
    rig_close();
    CHECK(pthread_join(keeper.thread, NULL) == 0);
}

/* ---- tests --------------------------------------------------------------------------- */

static void at_work(void)
{
    open_disk(1, LET_GO);
    rig_work(1500);
    CHECK_EQUAL(rig.failed, 0);
    close_disk();
    CHECK_EQUAL(keeper.seen, VS_NBD_CLOSED);
}

static void at_work_with_several_connections(void)
{
    open_disk(4, LET_GO);
    rig_work(1500);
    CHECK_EQUAL(rig.failed, 0);
    close_disk();
}

static void opened_and_closed_many_times(void)
{
    for (int i = 0; i < 20; i++) {
        open_disk(1 + i % 3, LET_GO);
        rig_work(i % 4 * 10);
        close_disk();
    }
}

static void closed_before_an_engine_has_it(void)
{
    vs_nbd *nbd = connected(2);
    disk_close(vs_nbd_disk(nbd));
    vs_nbd_release(nbd);
}

static void the_server_is_killed(void)
{
    open_disk(2, LET_GO);
    rig_work(100);
    rig_fill_slots();
    kill_server();
    rig_drain();
    rig_fill_slots();
    rig_drain();
    CHECK(rig.failed >= SLOTS / 2 && rig.failure == -ENOTCONN && rig.disk->lost);
    close_disk();
    CHECK_EQUAL(keeper.seen, VS_NBD_LOST);
    start_server();
}

/* Nothing that a guest waits for is lost: it is sent again. */
static void another_connection_takes_its_place(void)
{
    open_disk(3, BRING_BACK);
    disk_serve(rig.disk, true);
    rig_work(100); /* from the first flush on, nothing can be forgotten */
    rig_fill_slots();
    kill_server();
    start_server(); /* it ends with the thread that starts it */
    rig_work(500);
    CHECK_EQUAL(rig.failed, 0);
    close_disk();
    CHECK(keeper.seen == VS_NBD_HELD || keeper.seen == VS_NBD_UNCERTAIN);
}

static void nobody_waits_for_another_connection(void)
{
    open_disk(1, GIVE_UP);
    disk_serve(rig.disk, true);
    rig_work(100);
    kill_server();
    rig_fill_slots();
    rig_drain();
    CHECK(rig.failed > 0 && rig.failure == -ENOTCONN);
    close_disk();
    start_server();
}

static void a_server_that_does_not_answer_is_cut_off(void)
{
    open_disk(2, LET_GO);
    rig_work(100);
    CHECK(kill(server, SIGSTOP) == 0);
    rig_fill_slots();
    CHECK(disk_cut_off(rig.disk) && disk_cut_off(rig.disk));
    rig_drain();
    CHECK(rig.failed > 0 && rig.failure == -ENOTCONN);
    CHECK(kill(server, SIGCONT) == 0);
    close_disk();
    CHECK_EQUAL(keeper.seen, VS_NBD_LOST);
}

int main(void)
{
    if (system("command -v nbdkit >/dev/null") != 0) {
        printf("1..0 # SKIP nbdkit is not installed\n");
        return 0;
    }
    CHECK(mkdtemp(folder));
    snprintf(socket_path, sizeof socket_path, "%s/s", folder);
    snprintf(image_path, sizeof image_path, "%s/image", folder);
    snprintf(uri, sizeof uri, "nbd+unix:///?socket=%s", socket_path);
    FILE *image = fopen(image_path, "w");
    CHECK(image && ftruncate(fileno(image), RIG_BYTES) == 0 && fclose(image) == 0);
    rig.chance = 1;
    CHECK_EQUAL(vs_nbd_begin(vs_disk_services()), 0);
    start_server();
    test("at work", at_work);
    test("at work with several connections", at_work_with_several_connections);
    test("opened and closed many times", opened_and_closed_many_times);
    test("closed before an engine has it", closed_before_an_engine_has_it);
    test("the server is killed", the_server_is_killed);
    test("another connection takes its place", another_connection_takes_its_place);
    test("nobody waits for another connection", nobody_waits_for_another_connection);
    test("a server that does not answer is cut off", a_server_that_does_not_answer_is_cut_off);
    kill_server();
    rig_free();
    unlink(socket_path);
    unlink(image_path);
    rmdir(folder);
    return tests_end();
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * For tests: one ordered record of what happens on several test disks and to a
 * dirty bitmap's file, from which every power cut can be made afterwards
 * (tests/powercut). See testing_api.h, struct vs_test_moment.
 */
#ifndef VS_TEST_RECORD_H
#define VS_TEST_RECORD_H

#include <stdint.h>

#include "testing.h"

/* Room for the bytes of a write that takes effect now; the caller fills it in at once. */
uint8_t *test_record_write(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length, uint64_t stamp);
uint8_t *test_record_loaded(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length);
uint8_t *test_record_forgot(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length);
void test_record_spoilt(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length);
void test_record_zero(vs_test_record *r, uint32_t disk, uint64_t offset, uint64_t length, uint64_t stamp);
/* All of the disk that took effect up to "stamp" is durable. */
void test_record_flushed(vs_test_record *r, uint32_t disk, uint64_t stamp);

#endif

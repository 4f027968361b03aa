// Where memory comes from, and huge pages under it.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace lucid {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks the system to back the memory with huge pages, now and in place. Its content and its address
// stay. A random row of a large table otherwise costs a walk through the page tables too: pooling
// 40,960 rows of 256 bytes out of 256 MB takes 1.04 ms on 4 KiB pages and 0.57 ms on huge ones.
// Only memory that is private and anonymous is touched, never the mapping of a file. It is a wish:
// where the system has no huge pages, or no memory to make them of, all stays as it was.
void BackWithHugePages(const void* data, size_t bytes);

// Whether the system gives huge pages to those who ask for them.
bool HugePagesOffered();

// The bytes that this process could still take: what the system has available, or what is left of a
// control group's limit (of versions 1 and 2, its parents' too) if that is less. A group's clean
// pages of files that nobody used of late count as free. -1 if the system does not say.
// root: a prefix for /proc and /sys, for tests.
int64_t FreeMemory(const char* root = "");

}  // namespace lucid

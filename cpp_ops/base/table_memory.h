// Where a session keeps a constant table: in the runtime's own memory, with huge pages in place, or
// in a copy on huge pages that the whole process shares.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>

#include "base/status.h"

namespace lucid {

// A smaller table stays as it is, whatever was asked for: it soon is in the caches, and so are its
// page table entries.
constexpr size_t kLargeTable = size_t{8} << 20;

enum class TableMemory {
  kAuto,          // kInplace for anonymous memory; a file's mapping is copied if there is room
  kInplace,       // anonymous memory gets huge pages, a file's mapping stays as it is
  kHugepageCopy,  // a file's mapping is copied, or the session fails; else as kInplace
  kMmap,          // no table is touched
};

// "auto", "inplace", "hugepage_copy" or "mmap"; anything else is an invalid argument.
Status ParseTableMemory(const char* text, TableMemory* memory);

enum class TableSource {
  kAnonymous,    // private and writable: what malloc gives
  kPrivateFile,  // a private mapping of a file: what external data is
  kOther,        // shared with others, or something else that is not the runtime's own
};

enum class TablePlan : int { kStay = 0, kInPlace = 1, kCopy = 2, kNoMemory = 3 };

// What is done with a table of so many bytes that has no copy yet. kAuto copies a private
// mapping if huge pages are to be had and a quarter of the free memory is left afterwards, so that
// a row of sessions cannot take it all; what is copied still has the file's pages in the page
// cache, which the system takes back when it must. free: FreeMemory().
TablePlan PlanTable(TableMemory memory, TableSource source, size_t bytes, int64_t free,
                    bool huge_pages);

// The progress of a copy, reported from 2 s on, every 5 s.
struct CopyProgress {
  void (*tell)(void* host, size_t done, size_t total);
  void* host;
};

// Moves *table, of so many bytes, where `memory` says. If that is elsewhere, *table is the copy,
// which lives until *keep and those of everybody else with the same source are gone. The same
// source: the same bytes of one file, by its device, inode, size and times of change, also the one
// that nobody can set; if the file has lost its name or was changed just before, also the same
// content. Does nothing to a table
// smaller than kLargeTable. Gives kOutOfMemory or kInternal (the file cannot be read or was changed
// meanwhile) for kHugepageCopy alone, and kInvalidArgument for it on other systems than Linux.
Status PlaceTable(TableMemory memory, size_t bytes, const CopyProgress& progress,
                  const void** table, std::shared_ptr<const void>* keep);

// An array with so many bytes per row, to be joined with others.
struct RowPart {
  const char* data;
  size_t bytes;
};

// Row i begins at data + i * stride; the parts of a row follow one another.
struct JoinedRows {
  std::shared_ptr<const void> memory;  // null: none were made
  const char* data = nullptr;
  size_t stride = 0;
};

// Whether rows of so many bytes are worth joining with the numbers that are read with them. For
// longer rows, one cache line more or less makes no difference.
constexpr bool IsWorthJoining(size_t row_bytes) { return row_bytes > 0 && row_bytes <= 1024; }

enum class JoinPlan : int { kNone = 0, kCopy = 1, kHugePageCopy = 2 };

// What JoinRows does for rows that take so many bytes together. None are joined where `memory`
// leaves tables where they are, nor, from kLargeTable bytes on, where kAuto would not copy, nor on
// systems other than Linux. free: FreeMemory(), which only matters from kLargeTable bytes on.
JoinPlan PlanJoin(TableMemory memory, size_t bytes, int64_t free, bool huge_pages);

// Copies arrays of `rows` rows so that the parts of every row lie beside each other: reading a row
// then takes a cache line or two, and not one for each array. Without a copy, the caller reads the
// arrays where they are.
JoinedRows JoinRows(TableMemory memory, const RowPart* parts, size_t num_parts, size_t rows,
                    const CopyProgress& progress);

// The copies that exist now, their bytes, and how many were ever made.
struct TableCopies {
  int64_t living, bytes, made;
};
TableCopies CountTableCopies();

}  // namespace lucid

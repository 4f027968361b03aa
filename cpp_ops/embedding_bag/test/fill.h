// Random tables and bags for the tests of kernels, each of which has a Case of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/test/testing.h"

namespace lucid {

template <class Case>
void FillTable(Case* c, int64_t rows, int64_t columns) {
  c->rows = rows;
  c->columns = columns;
  c->weight.resize(static_cast<size_t>(rows * columns));
  for (double& x : c->weight) x = Normal();
}

template <class Case>
void FillBags(Case* c, const std::vector<int64_t>& lengths, bool include_last_offset) {
  c->flat = true;
  c->include_last_offset = include_last_offset;
  int64_t n = 0;
  for (const int64_t length : lengths) {
    c->offsets.push_back(n);
    n += length;
  }
  if (include_last_offset) c->offsets.push_back(n);
  for (int64_t k = 0; k < n; ++k) c->indices.push_back(Below(c->rows));
  // Past the last bag: never read, so it may be anything.
  if (include_last_offset) c->indices.insert(c->indices.end(), {-1, INT32_MAX, c->rows});
  c->weights.resize(c->indices.size());
  for (double& x : c->weights) x = Normal();
}

template <class Case>
void FillGrid(Case* c, int64_t bags, int64_t length) {
  c->flat = false;
  c->bags = bags;
  c->length = length;
  for (int64_t k = 0; k < bags * length; ++k) c->indices.push_back(Below(c->rows));
  c->weights.resize(c->indices.size());
  for (double& x : c->weights) x = Normal();
}

// What WhileWritten makes of an array of int64: the array, two others that are as legal, and, if
// `wild`, one with values that nothing has.
inline std::vector<std::vector<char>> ContentsInTurn(const std::vector<int64_t>& array,
                                                     int64_t limit, bool ascending, bool wild) {
  std::vector<std::vector<int64_t>> all(wild ? 4 : 3, array);
  for (size_t i = 1; i < all.size(); ++i) {
    for (int64_t& x : all[i]) x = i == 2 ? limit - 1 : Below(limit);
    if (ascending) std::sort(all[i].begin(), all[i].end());
    for (int64_t& x : all[i]) {
      if (i == 3 && Below(4) == 0) x = static_cast<int64_t>(g_random());
    }
    if (ascending) all[i][0] = 0;
  }
  std::vector<std::vector<char>> contents;
  for (const std::vector<int64_t>& values : all) {
    const char* const begin = reinterpret_cast<const char*>(values.data());
    contents.emplace_back(begin, begin + values.size() * sizeof(int64_t));
  }
  return contents;
}

}  // namespace lucid

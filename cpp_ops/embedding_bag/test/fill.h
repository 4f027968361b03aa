// Random tables and bags for the tests of kernels, each of which has a Case of its own.
#pragma once

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

}  // namespace lucid

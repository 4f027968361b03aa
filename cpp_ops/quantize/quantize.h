// Makes rows of floats smaller: quantized values with a scale per row, or floats of 16 bits. What a
// row becomes is the same bytes as `QuantizedTable.quantize` gives it in NumPy.
#pragma once

#include "quantize/args.h"

namespace lucid {

// How many rows are done: all, or those before the first one that the caller has to look at. That
// is one with a NaN; one to be quantized with an element beyond the limit; or one to be rounded
// with an infinity, or a number that would become one. -1: an argument is not valid.
int64_t QuantizeRows(const QuantizeArgs& args);

}  // namespace lucid

// A model on a CPU: matrix products y = x W^T with bfloat16, int8 or int4 weights (in groups of 32), attention, norms and gating.
// compiling.py compiles this file once, and kernels.py calls the functions marked extern "C". int_formats.py documents the layouts
// of int8 and int4 weights.
//
// Each token needs every weight once, so products with few rows are limited by memory bandwidth: each thread reads several long
// ranges of W at the same time and prefetches ahead, because one range keeps too few cache lines in flight (notes/decoding.md has
// the numbers). Products with many rows are limited by arithmetic: the sums of a tile (outputs x rows) stay in registers while
// the loop runs over the inputs.
//
// At the end of a parallel loop all threads wait for each other. That costs a microsecond on an idle machine and milliseconds on
// a busy one, so loops are merged where possible.
//
// Vectors are the compiler's own vector types. They have 16 lanes on every machine, which is simple; but GCC keeps a vector that is
// longer than the registers in memory, so the inner loops for many rows use vectors as long as the registers (Lanes). Only dot
// products of bfloat16 and 8-bit numbers, transposing, rounding and the exponential use intrinsics.
//
// Shapes: B rows of x, O outputs and X inputs of one matrix, N query heads. As template parameters, B, O and N count only what
// one tile computes: rows, outputs (in int_tile: blocks of outputs) and query heads.

#include "attention.h"
#include "bf16_product.h"
#include "decoder_layers.h"
#include "elementwise.h"
#include "int_product.h"
#include "logits.h"
#include "prefill_attention.h"
#include "quantize.h"
#include "rates.h"

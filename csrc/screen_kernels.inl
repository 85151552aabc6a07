// All kernels of a 16-bit screen of one instruction set and their table. Included by screen_*.cpp after vectors.inl,
// which says more, with these defined:
//   REFINELENS_KERNELS  a namespace of their own, which holds kVectorBytes, kGroup (tokens of a register tile) and
//                       multiply_add(sum, a, b), which adds the products of pairs of 16-bit numbers to 32-bit sums
//   REFINELENS_TABLE    the name of the table
//   REFINELENS_NAME     what it is called
#include "elements.inl"
#include "screen_product.inl"
// After the layout of the product.
#include "screen_fold.inl"
#include "screen_quantise.inl"
#include "screen_wide.inl"

namespace refinelens {

using namespace REFINELENS_KERNELS;
extern const ScreenKernels REFINELENS_TABLE = {
    REFINELENS_NAME, {kDigits, 1, kGroup, kPanel},
    widen, dot_product, quantise, nothing, nothing, multiply_tile, fold_tile,
};

}  // namespace refinelens

// All kernels of one instruction set and their table. Included by lens_*.cpp after the headers, and after a pragma that
// turns the instruction set on, with these defined:
//   REFINELENS_KERNELS  a namespace of their own, which holds kVectorBytes, kMaxVectors (vectors of hidden rows in a
//                       register tile) and kBlockBytes (part of the second-level cache that a block of tokens may fill)
//   REFINELENS_TABLE    the name of the table
// Everything in these files is compiled for that instruction set alone and instantiates nothing of the standard
// library: an inline function that the linker might share with code for older processors must not be compiled for
// newer ones.
#include "vectors.inl"

#include "elements.inl"

#include "product.inl"

#include "pack.inl"

#include "reduce.inl"

#include "scan.inl"

namespace refinelens {

extern const LensKernels REFINELENS_TABLE = {
    REFINELENS_KERNELS::kWide,      REFINELENS_KERNELS::block_tokens, REFINELENS_KERNELS::scratch_floats,
    REFINELENS_KERNELS::pack_panel, REFINELENS_KERNELS::scan_range,   REFINELENS_KERNELS::multiply_adds,
};

}  // namespace refinelens

// Which instruction set the kernels use. One binary holds the kernels of every instruction set (lens/lens_kernels.cpp,
// screen/screen_kernels.cpp, screen/screen_amx.cpp), each as a table of functions.
#pragma once

// GCC alone compiles a part of a file for another processor by a pragma; elsewhere, and with REFINELENS_PORTABLE, only
// the baseline is built, which needs no x86 header.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(REFINELENS_PORTABLE)
#define REFINELENS_X86_LEVELS 1
#else
#define REFINELENS_X86_LEVELS 0
#endif

// AMX is known from GCC 11 on; that a process may use its tiles is asked of Linux.
#if REFINELENS_X86_LEVELS && __GNUC__ >= 11 && defined(__linux__)
#define REFINELENS_X86_AMX 1
#else
#define REFINELENS_X86_AMX 0
#endif

namespace refinelens {

enum class Isa { baseline, v3, v4, amx };  // in the order of preference

// The widest one that was built and that this processor runs.
Isa widest_isa();

// widest_isa(), or the one that the environment variable REFINELENS_ISA names (baseline, v3, v4, amx). The variable is
// read at every call, so that a test or a benchmark can compare instruction sets in one process.
// Throws std::invalid_argument for a name that is unknown or that this processor does not run.
Isa selected_isa();

// For people: "x86-64-v4 (AVX-512)".
const char* isa_description(Isa isa);

}  // namespace refinelens

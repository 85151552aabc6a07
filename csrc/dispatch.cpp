#include "dispatch.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace refinelens {

namespace {

constexpr struct {
  Isa isa;
  const char* name;
  const char* description;
} kIsas[] = {
#if REFINELENS_X86_LEVELS
    {Isa::baseline, "baseline", "x86-64 baseline (SSE2)"},
#else
    {Isa::baseline, "baseline", "compiler default"},
#endif
    {Isa::v3, "v3", "x86-64-v3 (AVX2)"},
    {Isa::v4, "v4", "x86-64-v4 (AVX-512)"},
};

Isa detect() {
#if REFINELENS_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) return Isa::v4;
  if (v3) return Isa::v3;
#endif
  return Isa::baseline;
}

}  // namespace

Isa widest_isa() {
  static const Isa widest = detect();
  return widest;
}

Isa picked_isa() {
  const char* wanted = std::getenv("REFINELENS_ISA");
  if (!wanted || !*wanted) return widest_isa();
  std::string known;
  for (const auto& entry : kIsas) {
    if (entry.isa > widest_isa()) break;
    if (entry.name == std::string(wanted)) return entry.isa;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument("REFINELENS_ISA: expected one of " + known + " on this processor, got '" + wanted + "'");
}

const char* isa_description(Isa isa) {
  for (const auto& entry : kIsas)
    if (entry.isa == isa) return entry.description;
  return "unknown";
}

}  // namespace refinelens

#include "common/dispatch.hpp"

#if REFINELENS_X86_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
    {Isa::amx, "amx", "x86-64-v4 (AVX-512) and AMX"},
};

#if REFINELENS_X86_AMX
// Linux saves the state of the tiles only for a process that has asked for it.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif REFINELENS_X86_LEVELS
bool may_use_tiles() { return false; }
#endif

Isa detect() {
#if REFINELENS_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (v4) return may_use_tiles() ? Isa::amx : Isa::v4;
  if (v3) return Isa::v3;
#endif
  return Isa::baseline;
}

}  // namespace

Isa widest_isa() {
  static const Isa widest = detect();
  return widest;
}

Isa selected_isa() {
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

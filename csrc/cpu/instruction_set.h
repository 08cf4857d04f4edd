// Kernels that are compiled once per instruction set: which sets there are, and which one this machine takes.
#pragma once

#include <cstdlib>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEMLOC_INSTRUCTION_SETS 1
#else
#define MEMLOC_INSTRUCTION_SETS 0
#endif

namespace memloc {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine, or a lesser one that MEMLOC_CPU_CAPABILITY names.
inline InstructionSet instruction_set() {
#if MEMLOC_INSTRUCTION_SETS
  const char* const named = std::getenv("MEMLOC_CPU_CAPABILITY");
  const std::string wanted = named != nullptr ? named : "";
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx512 && wanted != "avx2" && wanted != "baseline") return InstructionSet::kAvx512;
  if (avx2 && wanted != "baseline") return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

// make(std::integral_constant<InstructionSet, ...>) for that set.
template <typename Make>
auto for_this_machine(const Make& make) {
#if MEMLOC_INSTRUCTION_SETS
  const InstructionSet set = instruction_set();
  if (set == InstructionSet::kAvx512) return make(std::integral_constant<InstructionSet, InstructionSet::kAvx512>());
  if (set == InstructionSet::kAvx2) return make(std::integral_constant<InstructionSet, InstructionSet::kAvx2>());
#endif
  return make(std::integral_constant<InstructionSet, InstructionSet::kBaseline>());
}

}  // namespace memloc

// CPUID says what the processor has, XCR0 which registers the operating system saves; both must agree.
#include "cpu/isa.h"

#include <cstdlib>

#include "check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gptoss::cpu {
namespace {

struct Isa {
  const KernelTable* kernels;
  bool supported;
};

#if defined(__x86_64__)
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};

bool bit(unsigned value, int index) { return value >> index & 1; }

uint64_t saved_registers() {  // XCR0
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

std::vector<Isa> detect() {
  const Cpuid basic(1, 0), extended(7, 0), extended1(7, 1);
  const uint64_t xcr0 = bit(basic.ecx, 27) ? saved_registers() : 0;  // OSXSAVE
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xE6) == 0xE6;
  const bool avx2 =
      ymm && bit(basic.ecx, 28) && bit(basic.ecx, 12) /* fma */ && bit(basic.ecx, 29) /* f16c */ && bit(extended.ebx, 5);
  const bool avxvnni = avx2 && bit(extended1.eax, 4);
  const bool avx512 = avx2 && zmm && bit(extended.ebx, 16) /* f */ && bit(extended.ebx, 17) /* dq */ &&
                      bit(extended.ebx, 30) /* bw */ && bit(extended.ebx, 31) /* vl */ && bit(extended.ecx, 11) /* vnni */;
  const bool avx512bf16 = avx512 && bit(extended.ecx, 1) /* vbmi */ && bit(extended1.eax, 5) /* bf16 */;
  return {{&gptoss_kernels_scalar, true},
          {&gptoss_kernels_avx2, avx2},
          {&gptoss_kernels_avxvnni, avxvnni},
          {&gptoss_kernels_avx512, avx512},
          {&gptoss_kernels_avx512bf16, avx512bf16}};
}
#else
std::vector<Isa> detect() { return {{&gptoss_kernels_scalar, true}}; }
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> detected = detect();
  return detected;
}

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.kernels->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.kernels->name);
  return names;
}

const KernelTable& select_kernels(const std::string& asked) {
  std::string name = asked;
  const char* source = "isa";
  if (const char* forced = std::getenv("GPTOSS_ISA"); name.empty() && forced && *forced) {
    name = forced;
    source = "GPTOSS_ISA";
  }
  const KernelTable* best = nullptr;
  for (const Isa& isa : isas()) {
    if (isa.supported) best = isa.kernels;
    if (isa.kernels->name != name) continue;
    CHECK(isa.supported, source, "=", name, " is not supported by this machine; it has ", supported_isas());
    return *isa.kernels;
  }
  CHECK(name.empty(), source, "=", name, " is unknown; possible here: ", supported_isas());
  return *best;
}

}  // namespace gptoss::cpu

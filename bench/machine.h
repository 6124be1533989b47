// What this machine can do, measured with the engine's own thread pool: the limits every other row is set against.
//
// Memory: the pool takes units of 8 MiB of a buffer far larger than any cache; a unit is read as 1, 2 or 4 sequential streams.
// Arithmetic: independent chains of one instruction, in registers only. A multiplication and its addition count as two.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "tensor.h"

namespace gptoss::bench {

template <class Work>
double seconds_of(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Single calls are timed and their median taken: a neighbour's burst then spoils a call, not the row.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// ------------------------------------------------------------------------------------------------------------- memory

inline constexpr size_t kReadUnit = size_t{8} << 20;
inline constexpr size_t kReadBytes = size_t{768} << 20;

template <int kStreams>
uint64_t read_plain(const char* data, size_t bytes) {
  uint64_t sums[4] = {};
  const size_t part = bytes / kStreams;
  for (size_t i = 0; i < part; i += 256)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < 256; j += 32)
        for (int k = 0; k < 4; ++k) {
          uint64_t word;
          std::memcpy(&word, data + s * part + i + j + 8 * k, 8);
          sums[k] ^= word;
        }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
}

#if defined(__x86_64__)
template <int kStreams>
__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, size_t bytes) {
  __m256i sums[4] = {};
  const size_t part = bytes / kStreams;
  for (size_t i = 0; i < part; i += 256)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < 8; ++j)
        sums[j % 4] =
            _mm256_xor_si256(sums[j % 4], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + s * part + i) + j));
  uint64_t lanes[16], result = 0;
  std::memcpy(lanes, sums, sizeof lanes);
  for (uint64_t lane : lanes) result ^= lane;
  return result;
}

template <int kStreams>
__attribute__((target("avx512f"))) uint64_t read_avx512(const char* data, size_t bytes) {
  __m512i sums[4] = {};
  const size_t part = bytes / kStreams;
  for (size_t i = 0; i < part; i += 256)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < 4; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(data + s * part + i + 64 * j));
  uint64_t lanes[32], result = 0;
  std::memcpy(lanes, sums, sizeof lanes);
  for (uint64_t lane : lanes) result ^= lane;
  return result;
}
#endif

// Reads `bytes` (a multiple of 1024) with the widest loads there are.
template <int kStreams>
uint64_t read_streams(const char* data, size_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512<kStreams>(data, bytes);
  if (__builtin_cpu_supports("avx2")) return read_avx2<kStreams>(data, bytes);
#endif
  return read_plain<kStreams>(data, bytes);
}

class MemoryReader {
 public:
  explicit MemoryReader(bool huge_pages) : buffer_(cpu::allocate_pages(kReadBytes)) {
    madvise(buffer_.data(), buffer_.bytes(), huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::memset(buffer_.data(), 1, kReadBytes);
  }

  // Reads the next `bytes`, a multiple of the unit, so that none of them is in a cache.
  void read(cpu::ThreadPool& pool, int streams, size_t bytes = kReadBytes) {
    const auto kernel = streams == 1 ? read_streams<1> : streams == 2 ? read_streams<2> : read_streams<4>;
    std::vector<uint64_t> sums(pool.size() * 8);  // a cache line each
    pool.run(static_cast<int64_t>(bytes / kReadUnit),
             [&](int64_t unit, int thread) { sums[thread * 8] ^= kernel(buffer_.as<char>() + unit * kReadUnit, kReadUnit); });
    sink_ = sums[0];
  }

 private:
  Buffer buffer_;
  int64_t next_ = 0;
  volatile uint64_t sink_ = 0;
};

// --------------------------------------------------------------------------------------------------------- arithmetic

// One instruction's peak: run(rounds) does ops_per_round x rounds operations.
struct Peak {
  std::string op;   // fma_f32, dot_bf16, dot_int8
  std::string isa;  // of the engine's sets, or the extension's own name
  double ops_per_round;
  void (*run)(int64_t rounds);
};

// Chains side by side: more than latency x instructions a cycle, and they fit the 16 registers, or the 32 of AVX-512.
inline constexpr int kChains = 12, kWideChains = 24;

// The body of a peak: chains of `step`. The compiler is kept from seeing that they are all alike, and that nobody reads them.
#define GPTOSS_CHAINS(n, type, zero, step)                                                         \
  type sums[n];                                                                                    \
  for (type& sum : sums) {                                                                         \
    sum = zero;                                                                                    \
    asm volatile("" : "+m"(sum));                                                                  \
  }                                                                                                \
  for (int64_t i = 0; i < rounds; ++i) _Pragma("GCC unroll 32") for (type& sum : sums) sum = step; \
  for (type& sum : sums) asm volatile("" : : "m"(sum))

inline void fma_f32_plain(int64_t rounds) {
  typedef float Lanes __attribute__((vector_size(16)));
  const Lanes a = {0.5f, 0.5f, 0.5f, 0.5f}, b = {1.0f, 1.0f, 1.0f, 1.0f};
  GPTOSS_CHAINS(kChains, Lanes, Lanes{}, sum * a + b);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) inline void fma_f32_avx2(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
  GPTOSS_CHAINS(kChains, __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(sum, a, b));
}
__attribute__((target("avx512f"))) inline void fma_f32_avx512(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
  GPTOSS_CHAINS(kWideChains, __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(sum, a, b));
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) inline void dot_bf16_avx512(int64_t rounds) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3E80), b = (__m512bh)_mm512_set1_epi16(0x3F80);  // 0.25, 1
  GPTOSS_CHAINS(kWideChains, __m512, _mm512_setzero_ps(), _mm512_dpbf16_ps(sum, a, b));
}
// By hand: GCC 12 keeps some sums of its own intrinsic in memory.
__attribute__((target("avx512f,avx512vnni"))) inline __m512i vpdpbusd(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
__attribute__((target("avx512f,avx512vnni"))) inline void dot_int8_avx512(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(1);
  GPTOSS_CHAINS(kWideChains, __m512i, _mm512_setzero_si512(), vpdpbusd(sum, a, b));
}
__attribute__((target("avx2,avxvnni"))) inline void dot_int8_avxvnni(int64_t rounds) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(1);
  GPTOSS_CHAINS(kChains, __m256i, _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(sum, a, b));
}
__attribute__((target("avx2"))) inline void dot_int8_avx2(int64_t rounds) {  // three instructions
  const __m256i b = _mm256_set1_epi8(1), one = _mm256_set1_epi16(1);
  GPTOSS_CHAINS(kChains, __m256i, _mm256_setzero_si256(),
                _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(sum, b), one)));
}
#endif
#undef GPTOSS_CHAINS

// The peaks this machine can run, plainest first.
inline std::vector<Peak> supported_peaks() {
  std::vector<Peak> peaks = {{"fma_f32", "scalar", kChains * 4 * 2, fma_f32_plain}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    for (const Peak& peak :
         {Peak{"fma_f32", "avx2", kChains * 8 * 2, fma_f32_avx2}, Peak{"dot_int8", "avx2", kChains * 32 * 2, dot_int8_avx2}})
      peaks.push_back(peak);
  if (__builtin_cpu_supports("avx512f")) peaks.push_back({"fma_f32", "avx512", kWideChains * 16 * 2, fma_f32_avx512});
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"))
    peaks.push_back({"dot_bf16", "avx512bf16", kWideChains * 32 * 2, dot_bf16_avx512});
  if (__builtin_cpu_supports("avxvnni")) peaks.push_back({"dot_int8", "avxvnni", kChains * 32 * 2, dot_int8_avxvnni});
  if (__builtin_cpu_supports("avx512vnni")) peaks.push_back({"dot_int8", "avx512vnni", kWideChains * 64 * 2, dot_int8_avx512});
#endif
  return peaks;
}

// ------------------------------------------------------------------------------------------------------------- limits

struct Limits {
  double bytes_per_second = 0;
  double dot_flops = 0;  // of the product the precision uses: bfloat16 or int8 dot products, else float32 FMA
  double fma_flops = 0;
};

// The best of many short passes: a limit is what the machine can do when nobody is in the way.
template <class Pass>
double fastest(const Pass& pass) {
  double best = seconds_of(pass);
  for (int i = 0; i < 20; ++i) best = std::min(best, seconds_of(pass));
  return best;
}

inline double measure_peak(cpu::ThreadPool& pool, const Peak& peak) {
  constexpr int64_t kRounds = 25000;
  const double seconds = fastest([&] { pool.run(pool.size() * 4, [&](int64_t, int) { peak.run(kRounds); }); });
  return peak.ops_per_round * kRounds * 4 * pool.size() / seconds;
}

// With the number of streams that goes fastest.
inline double measure_bandwidth(cpu::ThreadPool& pool, MemoryReader& reader) {
  constexpr size_t kBytes = size_t{128} << 20;
  double seconds = 1e30;
  for (int streams : {1, 2, 4}) seconds = std::min(seconds, fastest([&] { reader.read(pool, streams, kBytes); }));
  return kBytes / seconds;
}

inline const Peak& peak_of(const std::string& op, const std::string& isa) {
  static const std::vector<Peak> peaks = supported_peaks();
  for (const Peak& peak : peaks)
    if (peak.op == op && peak.isa == isa) return peak;
  FAIL("no peak ", op, " for ", isa);
}

// The machine's limits for one of the engine's instruction sets. int8: its products are of bytes, where it has such.
inline Limits measure_limits(cpu::ThreadPool& pool, MemoryReader& reader, const std::string& isa, bool int8) {
  const bool bf16 = isa == "avx512bf16";
  Limits limits;
  limits.bytes_per_second = measure_bandwidth(pool, reader);
  limits.fma_flops = measure_peak(pool, peak_of("fma_f32", bf16 ? "avx512" : isa == "avxvnni" ? "avx2" : isa));
  if (int8 && isa != "scalar")
    limits.dot_flops = measure_peak(pool, peak_of("dot_int8", isa.rfind("avx512", 0) == 0 ? "avx512vnni" : isa));
  else
    limits.dot_flops = bf16 ? measure_peak(pool, peak_of("dot_bf16", isa)) : limits.fma_flops;
  return limits;
}

}  // namespace gptoss::bench

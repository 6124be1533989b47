// Views by value, owners by RAII. Nothing here knows where memory lives: a backend made it and only that backend reads it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace gptoss {

enum class DType { F32, BF16, U8, I32 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "F32";
    case DType::BF16:
      return "BF16";
    case DType::U8:
      return "U8";
    case DType::I32:
      return "I32";
  }
  return "?";
}

// A dense row-major matrix in backend memory.
template <class T>
struct Mat {
  T* data = nullptr;  // [rows, cols]
  int64_t rows = 0;
  int64_t cols = 0;

  T* row(int64_t i) const { return data + i * cols; }
  int64_t size() const { return rows * cols; }
};

// A dense tensor in host memory, as the checkpoint has it. The name is what errors say.
struct HostTensor {
  std::string name;
  const void* data = nullptr;  // shape, row-major
  DType dtype = DType::F32;
  std::vector<int64_t> shape;
  bool on_device = false;  // data is the backend's memory: matrices only
};

// Backend memory that frees itself.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, size_t bytes, std::function<void(void*, size_t)> release)
      : data_(data), bytes_(bytes), release_(std::move(release)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(release_, other.release_);
    return *this;
  }
  ~Buffer() {
    if (data_) release_(data_, bytes_);
  }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <class T>
  Mat<T> mat(int64_t rows, int64_t cols) const {
    return {static_cast<T*>(data_), rows, cols};
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  std::function<void(void*, size_t)> release_;
};

// A weight matrix in the arrangement its backend chose while loading. The model only carries it around.
enum class WeightFormat {
  kTable,  // bfloat16 rows to look up (embedding) or to multiply in float32 (router)
  kBf16,   // bfloat16 matrix of a product
  kMxfp4,  // MXFP4 matrices of a product, one per expert
  kInt8,   // what the CPU makes of kBf16 for the precision "fast": int8, 64 inputs of a row to a scale
};

// Which rows belong together: a backend may lay them side by side, so that whoever has the one has the other.
enum class RowOrder {
  kPlain,
  kGateUp,     // rows alternate gate, up and feed SwiGLU together
  kRopePairs,  // heads of 64 rows, of which i and i + 32 are rotated together
};

struct Weight {
  WeightFormat format = WeightFormat::kTable;
  int64_t experts = 1;
  int64_t rows = 0;  // outputs of one expert's matrix
  int64_t cols = 0;  // inputs
  RowOrder order = RowOrder::kPlain;
  Buffer storage;
};

}  // namespace gptoss

// The operations on a GPU: checks, work space, and which kernel. Everything goes onto one stream in order.
//
// The operations that feed a product (rmsnorm, attention) write their result rounded to bfloat16 besides, so that the product
// that follows reads it; a product of other rows rounds them first. Work space is taken by reserve(); an operation outside a
// model, or one that needs more (attention over many pages), takes more when it first needs it.
#include "backend.h"

#include <algorithm>
#include <memory>

#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace gptoss::cuda {
namespace {

constexpr int kOldestMajor = 8;  // bf16 mma, cp.async

class CudaBackend final : public Backend {
 public:
  CudaBackend(int device, const BackendOptions& options) : device_(device), max_tokens_(options.max_batch_tokens) {
    use();
    CUDA_CHECK(cudaGetDeviceProperties(&properties_, device));
    hopper_ = properties_.major == 9 && !options.invariant;
    stream_ = std::make_unique<Stream>();
    batch_copied_ = std::make_unique<Event>();
    stage_ = std::make_unique<Stage>();
  }
  ~CudaBackend() override {
    if (cudaSetDevice(device_) == cudaSuccess) cudaStreamSynchronize(*stream_);
  }

  std::string device() const override { return join("cuda:", device_); }
  std::string isa() const override { return join("sm_", properties_.major, properties_.minor, " (", properties_.name, ")"); }
  int threads() const override { return properties_.multiProcessorCount; }

  // --- memory -----------------------------------------------------------------------------------------------------
  Buffer allocate(size_t bytes) override {
    use();
    rounded_of_ = nullptr;
    Buffer buffer = device_memory(bytes);
    if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(buffer.data(), 0, bytes, *stream_));
    return buffer;
  }
  void copy_in(void* device, const void* host, size_t bytes) override {
    use();
    rounded_of_ = nullptr;
    CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, *stream_));
    stream_->wait();  // the host's memory may go
  }
  void copy_out(void* host, const void* device, size_t bytes) override {
    use();
    CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, *stream_));
    stream_->wait();
  }
  size_t available_memory() const override {
    use();
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return free;
  }
  void synchronize() override {
    use();
    stream_->wait();
  }
  void reserve(const ModelConfig& config) override;

  // --- weights ----------------------------------------------------------------------------------------------------
  Weight make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, bool gate_up) override;
  void load_rows(Weight& weight, int64_t first_row, const HostTensor& source) override;
  void load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) override;
  void load_mxfp4_scales(Weight& weight, const HostTensor& scales) override;

  // --- one step ---------------------------------------------------------------------------------------------------
  void begin(const Batch& batch) override;
  void embed(Mat<float> x, const Weight& table) override {
    use();
    forget(x.data);
    cuda::embed(x.data, batch_.tokens, table.storage.as<uint16_t>(), x.rows, x.cols, *stream_);
  }
  void rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) override;
  void linear(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias) override {
    product(out, t, weight, bias, Epilogue::kStore);
  }
  void linear_add(Mat<float> x, Mat<const float> a, const Weight& weight, const float* bias) override {
    product(x, a, weight, bias, Epilogue::kAdd);
  }
  void rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope, int64_t kv_heads) override {
    use();
    forget(q.data);
    cuda::rope_append(q.data, static_cast<uint16_t*>(cache.keys), static_cast<uint16_t*>(cache.values), qkv.data, rope.cos.data,
                      rope.sin.data, batch_, cache.window > 0, q.rows, q.cols / kHeadDim, kv_heads, *stream_);
  }
  void attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) override;
  void route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) override {
    use();
    cuda::route(top.experts.data, top.weights.data, t.data, weight.storage.as<uint16_t>(), bias, t.rows, t.cols, weight.rows,
                top.experts.cols, *stream_);
  }
  void moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) override;

 private:
  void use() const { CUDA_CHECK(cudaSetDevice(device_)); }

  // At least so many bytes. What was there may be in use until the stream has passed.
  void ensure(Buffer& buffer, int64_t bytes) {
    if (static_cast<int64_t>(buffer.bytes()) >= bytes) return;
    stream_->wait();
    buffer = Buffer();
    buffer = device_memory(bytes);
  }

  Rounded rounded(int64_t rows, int64_t cols) {
    const int64_t stride = round_up(cols, 64);
    ensure(rounded_, rows * stride * 2);
    return {rounded_.as<uint16_t>(), stride};
  }
  // `data` is written anew: a rounded copy of it is out of date.
  void forget(const float* data) {
    if (data == rounded_of_) rounded_of_ = nullptr;
  }
  void remember(Mat<const float> t) {
    rounded_of_ = t.data;
    rounded_rows_ = t.rows;
    rounded_cols_ = t.cols;
  }
  Rounded rounded_input(Mat<const float> t) {
    const Rounded result = rounded(t.rows, t.cols);
    if (rounded_of_ == t.data && rounded_rows_ >= t.rows && rounded_cols_ == t.cols) return result;
    round_rows(result, t.data, t.rows, t.cols, *stream_);
    remember(t);
    return result;
  }

  // n rows of x as hopper.cu wants them: row i is row slots[i] / gather of x, or row i where gather is 0.
  Rounded packed(Rounded x, const int32_t* slots, int32_t gather, int64_t n) {
    ensure(packed_, n * x.stride * 2);
    const Rounded result = {packed_.as<uint16_t>(), x.stride};
    hopper_pack(result, x, slots, gather, n, *stream_);
    return result;
  }
  void product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue);
  int64_t pages_seen(int64_t window) const;
  template <class Arrange>
  void send_rows(const HostTensor& source, int64_t n, int64_t row_bytes, const Arrange& arrange);

  int device_;
  int64_t max_tokens_;
  bool hopper_ = false;  // products of many tokens are hopper.cu's
  cudaDeviceProp properties_{};
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Stage> stage_;         // while loading
  std::unique_ptr<Event> batch_copied_;  // the pinned integers may be written again
  Buffer pinned_, integers_;             // of the batch
  DeviceBatch batch_;
  int64_t longest_ = 0, most_new_ = 0;  // of the batch's sequences: positions, new tokens

  Buffer rounded_;  // [n, cols] bfloat16
  const float* rounded_of_ = nullptr;
  int64_t rounded_rows_ = 0, rounded_cols_ = 0;
  Buffer partial_;                  // attention's parts
  Buffer slots_, tiles_, n_tiles_;  // [n k]; [tiles]; [1]
  Buffer packed_;                   // [n, cols] or [n k, H] bfloat16, for hopper.cu
  Buffer hidden_;                   // [n k, I] bfloat16
  Buffer outputs_;                  // [n k, H]
};

// ------------------------------------------------------------------------------------------------------------ weights

Weight CudaBackend::make_weight(WeightFormat format, int64_t experts, int64_t rows, int64_t cols, bool gate_up) {
  Weight weight{format, experts, rows, cols, gate_up, {}};
  CHECK(cols % 32 == 0, "a weight of ", cols, " inputs: they must be a multiple of 32");
  CHECK(experts == 1 || rows % 16 == 0, "expert matrices of ", rows, " rows: they must be a multiple of 16");
  weight.storage = allocate(
      format == WeightFormat::kTable ? rows * cols * 2 : arranged_bytes(format == WeightFormat::kMxfp4, experts, rows, cols));
  return weight;
}

// Sends n rows in parts of whole blocks of 16: arrange(device, first row, rows).
template <class Arrange>
void CudaBackend::send_rows(const HostTensor& source, int64_t n, int64_t row_bytes, const Arrange& arrange) {
  use();
  CHECK(stage_, source.name, ": weights are loaded before reserve");
  const int64_t step = std::max<int64_t>(16, static_cast<int64_t>(Stage::kBytes) / row_bytes / 16 * 16);
  for (int64_t row = 0; row < n; row += step) {
    const int64_t now = std::min(step, n - row);
    stage_->send(static_cast<const uint8_t*>(source.data) + row * row_bytes, now * row_bytes, *stream_,
                 [&](void* device) { arrange(device, row, now); });
  }
}

void CudaBackend::load_rows(Weight& weight, int64_t first_row, const HostTensor& source) {
  const int64_t cols = weight.cols;
  const bool table = weight.format == WeightFormat::kTable;
  CHECK(table || first_row % 16 == 0, source.name, ": its rows start at ", first_row, ", inside a block of 16");
  uint8_t* storage = weight.storage.as<uint8_t>();
  send_rows(source, source.shape[0], cols * 2, [&](void* device, int64_t row, int64_t n) {
    if (table)
      CUDA_CHECK(
          cudaMemcpyAsync(storage + (first_row + row) * cols * 2, device, n * cols * 2, cudaMemcpyDeviceToDevice, *stream_));
    else
      arrange_bf16(storage, static_cast<const uint16_t*>(device), first_row + row, n, cols, *stream_);
  });
}

void CudaBackend::load_mxfp4_blocks(Weight& weight, const HostTensor& blocks) {
  send_rows(blocks, weight.experts * weight.rows, weight.cols / 2, [&](void* device, int64_t row, int64_t n) {
    arrange_mxfp4(weight.storage.as<uint8_t>(), static_cast<const uint8_t*>(device), row, n, weight.cols, weight.gate_up,
                  *stream_);
  });
}

void CudaBackend::load_mxfp4_scales(Weight& weight, const HostTensor& scales) {
  uint8_t* storage = weight.storage.as<uint8_t>() + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  send_rows(scales, weight.experts * weight.rows, weight.cols / 32, [&](void* device, int64_t row, int64_t n) {
    arrange_scales(storage, static_cast<const uint8_t*>(device), row, n, weight.cols, weight.gate_up, *stream_);
  });
}

void CudaBackend::reserve(const ModelConfig& config) {
  use();
  const int64_t n = max_tokens_, slots = n * config.experts_per_token;
  rounded(n, std::max(config.hidden_size, config.q_size()));
  ensure(slots_, slots * 4);
  ensure(tiles_, (slots / 8 + std::min(slots, config.n_experts) + 1) * static_cast<int64_t>(sizeof(TokenTile)));
  ensure(n_tiles_, 4);
  ensure(hidden_, slots * round_up(config.intermediate_size, 64) * 2);
  CUDA_CHECK(cudaMemsetAsync(hidden_.data(), 0, hidden_.bytes(), *stream_));  // columns past the end stay 0
  ensure(outputs_, slots * config.hidden_size * 4);
  if (hopper_) ensure(packed_, std::max(slots * round_up(config.hidden_size, 64), n * round_up(config.q_size(), 64)) * 2);
}

// ------------------------------------------------------------------------------------------------------------ a step

void CudaBackend::begin(const Batch& batch) {
  use();
  rounded_of_ = nullptr;
  const int64_t n = batch.n_tokens(), sequences = static_cast<int64_t>(batch.sequences.size());
  CHECK(n <= max_tokens_, "a step takes at most ", max_tokens_, " tokens, not ", n);
  int64_t count = 3 * n + 2 * sequences;
  for (const BatchSequence& s : batch.sequences)
    count += static_cast<int64_t>(s.full_pages->pages.size() + s.window_pages->pages.size());
  batch_copied_->wait();
  if (static_cast<int64_t>(pinned_.bytes()) < count * 4) pinned_ = pinned_memory(2 * count * 4);
  ensure(integers_, static_cast<int64_t>(pinned_.bytes()));

  int32_t* next = pinned_.as<int32_t>();
  const auto put = [&](const std::vector<int32_t>& values) {
    std::copy(values.begin(), values.end(), next);
    const int32_t* place = integers_.as<int32_t>() + (next - pinned_.as<int32_t>());
    next += values.size();
    return place;
  };
  batch_.tokens = put(batch.tokens);
  batch_.positions = put(batch.positions);
  batch_.sequence_of = put(batch.sequence_of);
  std::vector<int32_t> full_base, window_base, pages;
  longest_ = most_new_ = 0;
  const auto add = [&](std::vector<int32_t>& base, const PageList& list) {
    base.push_back(static_cast<int32_t>(static_cast<int64_t>(pages.size()) - list.first_page));
    pages.insert(pages.end(), list.pages.begin(), list.pages.end());
  };
  for (const BatchSequence& s : batch.sequences) {
    add(full_base, *s.full_pages);
    add(window_base, *s.window_pages);
    longest_ = std::max(longest_, s.position + s.n_rows);
    most_new_ = std::max(most_new_, s.n_rows);
  }
  batch_.full_base = put(full_base);
  batch_.window_base = put(window_base);
  batch_.pages = put(pages);
  CUDA_CHECK(cudaMemcpyAsync(integers_.data(), pinned_.data(), count * 4, cudaMemcpyHostToDevice, *stream_));
  batch_copied_->record(*stream_);
}

void CudaBackend::rmsnorm(Mat<float> t, Mat<const float> x, const float* weight, float eps, const int32_t* rows) {
  use();
  const Rounded result = rounded(t.rows, t.cols);
  for (int64_t first = 0; first < t.rows; first += rows ? RowList::kMax : t.rows) {
    const int64_t n = rows ? std::min<int64_t>(RowList::kMax, t.rows - first) : t.rows;
    RowList list{};
    if (rows) std::copy_n(rows + first, n, list.rows);
    cuda::rmsnorm(t.row(first), {result.data + first * result.stride, result.stride}, x.data, weight, eps, n, t.cols,
                  rows ? &list : nullptr, *stream_);
  }
  remember({t.data, t.rows, t.cols});
}

void CudaBackend::product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue) {
  use();
  MatmulArgs args;
  args.x = rounded_input(t);
  args.codes = weight.storage.as<uint8_t>();
  args.scales = args.codes + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  args.rows = weight.rows;
  args.cols = weight.cols;
  args.n = t.rows;
  args.bias = bias;
  args.out = out.data;
  const bool mxfp4 = weight.format == WeightFormat::kMxfp4;
  if (hopper_ && hopper_pays(t.rows, 1)) {
    args.x = packed(args.x, nullptr, 0, t.rows);
    hopper_matmul(args, mxfp4, epilogue, properties_.multiProcessorCount, *stream_);
  } else {
    matmul(args, mxfp4, epilogue, matmul_tile(t.rows), *stream_);
  }
  forget(out.data);
}

// Pages that one row of the batch can see, at most.
int64_t CudaBackend::pages_seen(int64_t window) const {
  const int64_t all = ceil_div(longest_, kPageTokens);
  return window ? std::min(all, ceil_div(window - 1, kPageTokens) + 1) : all;
}

void CudaBackend::attention(Mat<float> out, Mat<const float> q, const KvLayer& cache, const float* sinks, int64_t kv_heads) {
  use();
  AttentionArgs args;
  args.out = out.data;
  args.rounded = rounded(out.rows, out.cols);
  args.q = q.data;
  args.keys = static_cast<const uint16_t*>(cache.keys);
  args.values = static_cast<const uint16_t*>(cache.values);
  args.sinks = sinks;
  args.batch = batch_;
  args.n = q.rows;
  args.heads = q.cols / kHeadDim;
  args.kv_heads = kv_heads;
  args.window = cache.window;
  args.max_pages = pages_seen(cache.window);
  ensure(partial_, attention_partial_bytes(args));
  args.partial = partial_.as<float>();
  cuda::attention(args, *stream_);
  remember({out.data, out.rows, out.cols});
}

void CudaBackend::moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) {
  use();
  const Weight &gate_up = *experts.gate_up, &down = *experts.down;
  const int64_t k = top.experts.cols, slots = t.rows * k, n_experts = gate_up.experts;
  const bool hopper = hopper_ && hopper_pays(slots, n_experts);
  const int64_t tile = hopper ? kHopperTokens : matmul_tile(ceil_div(slots, n_experts));
  const Rounded hidden = {hidden_.as<uint16_t>(), round_up(down.cols, 64)};
  MatmulArgs args;
  args.x = rounded_input(t);
  args.tiles = tiles_.as<TokenTile>();
  args.n_tiles = n_tiles_.as<int32_t>();
  args.max_tiles = slots / tile + std::min(slots, n_experts);
  args.slots = slots_.as<int32_t>();
  dispatch(slots_.as<int32_t>(), tiles_.as<TokenTile>(), n_tiles_.as<int32_t>(), top.experts.data, slots, n_experts, tile,
           *stream_);

  const auto experts_product = [&](const MatmulArgs& a, Epilogue epilogue) {
    if (hopper)
      hopper_matmul(a, true, epilogue, properties_.multiProcessorCount, *stream_);
    else
      matmul(a, true, epilogue, tile, *stream_);
  };
  MatmulArgs up = args;
  up.codes = gate_up.storage.as<uint8_t>();
  up.scales = up.codes + arranged_scales_offset(n_experts, gate_up.rows, gate_up.cols);
  up.rows = gate_up.rows;
  up.cols = gate_up.cols;
  up.n = slots;
  up.bias = experts.gate_up_bias;
  up.hidden = hidden;
  up.limit = experts.swiglu_limit;
  up.gather = static_cast<int32_t>(k);
  if (hopper) up.x = packed(up.x, up.slots, up.gather, slots);
  experts_product(up, Epilogue::kSwiglu);

  args.x = hidden;
  args.codes = down.storage.as<uint8_t>();
  args.scales = args.codes + arranged_scales_offset(n_experts, down.rows, down.cols);
  args.rows = down.rows;
  args.cols = down.cols;
  args.n = slots;
  args.bias = experts.down_bias;
  args.out = outputs_.as<float>();
  args.scatter = true;
  experts_product(args, Epilogue::kStore);
  combine(x.data, outputs_.as<float>(), top.weights.data, t.rows, k, x.cols, *stream_);
  forget(x.data);
}

int device_index(const std::string& device) {
  if (device == "cuda") return 0;
  const std::string digits = device.rfind("cuda:", 0) == 0 ? device.substr(5) : "";
  CHECK(!digits.empty() && digits.size() < 5 && digits.find_first_not_of("0123456789") == std::string::npos,
        "device must be \"cuda\" or \"cuda:N\", not \"", device, "\"");
  return std::stoi(digits);
}

}  // namespace
}  // namespace gptoss::cuda

namespace gptoss {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  const int device = cuda::device_index(options.device);
  int n = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&n); status != cudaSuccess || n == 0) {
    cudaGetLastError();
    FAIL("device \"", options.device, "\" was asked for, but this machine has no usable GPU (",
         status == cudaSuccess ? "none found" : cudaGetErrorString(status), "); use device=\"cpu\"");
  }
  CHECK(device < n, "device \"", options.device, "\" was asked for, but this machine has ", n, n == 1 ? " GPU" : " GPUs");
  cudaDeviceProp properties{};
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  if (properties.major < cuda::kOldestMajor)
    FAIL("device \"", options.device, "\" is a ", properties.name, " of compute capability ", properties.major, ".",
         properties.minor, ", but gptoss needs ", cuda::kOldestMajor, ".0 or newer; use device=\"cpu\"");
  return std::make_unique<cuda::CudaBackend>(device, options);
}

bool cuda_available() {
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  for (int device = 0; device < n; ++device) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) == cudaSuccess && properties.major >= cuda::kOldestMajor) return true;
  }
  return false;
}

}  // namespace gptoss

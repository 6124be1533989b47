// Single operations of a backend on CPU tensors, so that tests can hold each against a reference.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend.h"
#include "bindings/bindings.h"
#include "bindings/dlpack.h"
#include "kv_cache.h"
#include "model.h"

namespace py = pybind11;
using namespace py::literals;

namespace gptoss {
namespace {

constexpr int64_t kAny = -1;

class Ops {
 public:
  Ops(const std::string& device, const std::string& isa, int threads, const std::string& precision, bool invariant) {
    const BackendOptions options{device, threads, isa, kMaxRows, invariant, precision_of(precision)};
    backend_ = device == "cpu" ? make_cpu_backend(options) : make_cuda_backend(options);
  }

  std::string isa() const { return backend_->isa(); }

  void embed(py::object out, py::object tokens, py::object table) {
    BorrowedTensor out_(out, "out"), tokens_(tokens, "tokens"), table_(table, "table");
    const int64_t n = extent(tokens_, 0), H = extent(table_, 1);
    float* result = out_.data<float>(DType::F32, {n, H});
    Batch batch;
    const int32_t* ids = tokens_.data<int32_t>(DType::I32, {n});
    batch.tokens.assign(ids, ids + n);
    backend_->begin(batch);
    const Weight weight = make_rows(WeightFormat::kTable, table_);
    Buffer x = take(n * H);
    backend_->embed(x.mat<float>(n, H), weight);
    give(result, x, n * H);
  }

  void rmsnorm(py::object out, py::object x, py::object weight, float eps) {
    BorrowedTensor out_(out, "out"), x_(x, "x"), weight_(weight, "weight");
    const int64_t n = extent(x_, 0), H = extent(x_, 1);
    float* result = out_.data<float>(DType::F32, {n, H});
    const Buffer w = put(weight_, {H}), in = put(x_, {n, H});
    Buffer t = take(n * H);
    backend_->rmsnorm(t.mat<float>(n, H), in.mat<const float>(n, H), w.as<float>(), eps, nullptr);
    give(result, t, n * H);
  }

  void linear(py::object out, py::object x, py::object weight, py::object bias, bool add) {
    BorrowedTensor out_(out, "out"), x_(x, "x"), weight_(weight, "weight");
    const int64_t n = extent(x_, 0), K = extent(x_, 1), M = extent(weight_, 0);
    weight_.data<uint16_t>(DType::BF16, {M, K});
    product(out_, x_, make_rows(WeightFormat::kBf16, weight_), bias, add, n, M, K);
  }

  void mxfp4_linear(py::object out, py::object x, py::object blocks, py::object scales) {
    BorrowedTensor out_(out, "out"), x_(x, "x"), blocks_(blocks, "blocks"), scales_(scales, "scales");
    const int64_t n = extent(x_, 0), K = extent(x_, 1), M = extent(blocks_, 0);
    Weight weight = make_mxfp4(blocks_, scales_, 1, M, K, RowOrder::kPlain);
    product(out_, x_, weight, py::none(), false, n, M, K);
  }

  void route(py::object ids, py::object weights, py::object t, py::object weight, py::object bias) {
    BorrowedTensor ids_(ids, "ids"), weights_(weights, "weights"), t_(t, "t"), weight_(weight, "weight"), bias_(bias, "bias");
    const int64_t n = extent(t_, 0), H = extent(t_, 1), E = extent(weight_, 0), k = extent(ids_, 1);
    CHECK(k >= 1 && k <= E, "ids: ", k, " experts of ", E, " asked for");
    weight_.data<uint16_t>(DType::BF16, {E, H});
    reserve(H, H, E, k);
    begin_rows(n);
    const Buffer in = put(t_, {n, H}), b = put(bias_, {E});
    Buffer chosen = backend_->allocate(n * k * 4), shares = take(n * k);
    backend_->route({chosen.mat<int32_t>(n, k), shares.mat<float>(n, k)}, in.mat<const float>(n, H),
                    make_rows(WeightFormat::kTable, weight_), b.as<float>());
    give(ids_.data<int32_t>(DType::I32, {n, k}), chosen, n * k);
    give(weights_.data<float>(DType::F32, {n, k}), shares, n * k);
  }

  void moe(py::object x, py::object t, py::object ids, py::object weights, py::object gate_up_blocks, py::object gate_up_scales,
           py::object gate_up_bias, py::object down_blocks, py::object down_scales, py::object down_bias, float limit) {
    BorrowedTensor x_(x, "x"), t_(t, "t"), ids_(ids, "ids"), weights_(weights, "weights");
    const Experts e = make_experts({gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias});
    const int64_t n = extent(t_, 0), H = extent(t_, 1), E = e.gate_up.experts, k = extent(ids_, 1);
    const int32_t* chosen = ids_.data<int32_t>(DType::I32, {n, k});
    for (int64_t i = 0; i < n * k; ++i) CHECK(chosen[i] >= 0 && chosen[i] < E, "ids: ", chosen[i], " of ", E, " experts");
    reserve(H, e.down.cols, E, k);
    begin_rows(n);
    const Buffer in = put(t_, {n, H}), shares = put(weights_, {n, k});
    Buffer residual = put(x_, {n, H}), top = backend_->allocate(n * k * 4);
    backend_->copy_in(top.data(), chosen, n * k * 4);
    backend_->moe_add(residual.mat<float>(n, H), in.mat<const float>(n, H), {top.mat<int32_t>(n, k), shares.mat<float>(n, k)},
                      e.view(limit));
    give(x_.data<float>(DType::F32, {n, H}), residual, n * H);
  }

  // rope_append and attention on a fresh cache, each sequence in chunks of `chunk` rows (0: at once).
  void attention(py::object out, py::object qkv, py::object positions, const std::vector<int64_t>& lengths, py::object sinks,
                 int64_t window, ModelConfig config, int64_t chunk) {
    BorrowedTensor out_(out, "out"), qkv_(qkv, "qkv"), positions_(positions, "positions"), sinks_(sinks, "sinks");
    const int64_t n = extent(qkv_, 0), kv_heads = config.n_kv_heads;
    const float* rows = qkv_.data<float>(DType::F32, {n, config.qkv_size()});
    config.n_layers = 1;
    config.layer_windows = {window};
    config.validate();
    attend(out_, nullptr, rows, config.qkv_size(), positions_, lengths, sinks_, config, chunk,
           [&](Mat<float> q, const KvLayer& cache, Mat<const float> in, const RopeTable& rope) {
             backend_->rope_append(q, cache, in, rope, kv_heads);
           });
  }

  // norm_qkv and attention likewise. By the fused operation, or by the narrow ones one after the other. q gets the queries.
  void qkv_attention(py::object out, py::object q, py::object x, py::object norm, float eps, py::object weight, py::object bias,
                     py::object positions, const std::vector<int64_t>& lengths, py::object sinks, int64_t window,
                     ModelConfig config, int64_t chunk, bool fused) {
    BorrowedTensor out_(out, "out"), q_(q, "q"), x_(x, "x"), norm_(norm, "norm"), weight_(weight, "weight"),
        bias_(bias, "bias"), positions_(positions, "positions"), sinks_(sinks, "sinks");
    const int64_t n = extent(x_, 0), H = extent(x_, 1), M = config.qkv_size(), kv_heads = config.n_kv_heads;
    const float* rows = x_.data<float>(DType::F32, {n, H});
    const uint16_t* matrix = weight_.data<uint16_t>(DType::BF16, {M, H});
    config.n_layers = 1;
    config.layer_windows = {window};
    config.hidden_size = H;
    config.validate();
    Weight w = backend_->make_weight(WeightFormat::kBf16, 1, M, H, RowOrder::kRopePairs);
    for (const auto& [first, count] : {std::pair{int64_t{0}, config.q_size()}, std::pair{config.q_size(), config.kv_size()},
                                       std::pair{config.q_size() + config.kv_size(), config.kv_size()}})
      backend_->load_rows(w, first, {"weight", matrix + first * H, DType::BF16, {count, H}});
    const Buffer g = put(norm_, {H}), b = put(bias_, {M});
    attend(out_, q_.data<float>(DType::F32, {n, config.q_size()}), rows, H, positions_, lengths, sinks_, config, chunk,
           [&](Mat<float> to, const KvLayer& cache, Mat<const float> in, const RopeTable& rope) {
             Buffer t = take(in.rows * H), qkv = take(in.rows * M);
             const auto t_ = t.mat<float>(in.rows, H), qkv_ = qkv.mat<float>(in.rows, M);
             const Norm by{g.as<float>(), eps};
             if (fused)
               backend_->norm_qkv(to, cache, in, by, w, b.as<float>(), rope, kv_heads, t_, qkv_);
             else
               backend_->Backend::norm_qkv(to, cache, in, by, w, b.as<float>(), rope, kv_heads, t_, qkv_);
             backend_->synchronize();  // the work space goes
           });
  }

  // norm_route and moe_add onto x: t is the normed rows. By the fused operation, or by the narrow ones. The last `padding` rows
  // only fill up the batch.
  void mlp(py::object x, py::object t, py::object ids, py::object weights, py::object norm, float eps, py::object router,
           py::object router_bias, const std::vector<py::object>& experts, float limit, bool fused, int64_t padding) {
    BorrowedTensor x_(x, "x"), t_(t, "t"), ids_(ids, "ids"), weights_(weights, "weights"), norm_(norm, "norm"),
        router_(router, "router"), bias_(router_bias, "router_bias");
    const Experts e = make_experts(experts);
    const int64_t n = extent(x_, 0), H = extent(x_, 1), E = e.gate_up.experts, k = extent(ids_, 1);
    CHECK(k >= 1 && k <= E, "ids: ", k, " experts of ", E, " asked for");
    router_.data<uint16_t>(DType::BF16, {E, H});
    reserve(H, e.down.cols, E, k);
    begin_rows(n - padding);
    const Weight table = make_rows(WeightFormat::kTable, router_);
    const Buffer g = put(norm_, {H}), b = put(bias_, {E});
    Buffer residual = put(x_, {n, H}), normed = take(n * H), chosen = backend_->allocate(n * k * 4), shares = take(n * k);
    const Routing top = {chosen.mat<int32_t>(n, k), shares.mat<float>(n, k)};
    const auto in = residual.mat<const float>(n, H);
    if (fused)
      backend_->norm_route(top, normed.mat<float>(n, H), in, {g.as<float>(), eps}, table, b.as<float>());
    else
      backend_->Backend::norm_route(top, normed.mat<float>(n, H), in, {g.as<float>(), eps}, table, b.as<float>());
    backend_->moe_add(residual.mat<float>(n, H), normed.mat<const float>(n, H), top, e.view(limit));
    give(x_.data<float>(DType::F32, {n, H}), residual, n * H);
    give(t_.data<float>(DType::F32, {n, H}), normed, n * H);
    give(ids_.data<int32_t>(DType::I32, {n, k}), chosen, n * k);
    give(weights_.data<float>(DType::F32, {n, k}), shares, n * k);
  }

  // One token for each row; the logits are written back as the operation leaves them.
  std::vector<Sample> sample(py::object logits, const std::vector<const Sampler*>& samplers,
                             const std::vector<int64_t>& positions) {
    BorrowedTensor logits_(logits, "logits");
    const int64_t n = extent(logits_, 0), V = extent(logits_, 1);
    float* host = logits_.data<float>(DType::F32, {n, V});
    CHECK(std::ssize(samplers) == n && std::ssize(positions) == n, "samplers, positions: ", samplers.size(), " and ",
          positions.size(), " for ", n, " rows");
    std::vector<SampleRequest> rows;
    for (int64_t i = 0; i < n; ++i) {
      CHECK(samplers[i]->vocab_size() == V, "samplers: one is of a vocabulary of ", samplers[i]->vocab_size(), ", not ", V);
      rows.push_back({i, samplers[i], positions[i]});
    }
    Buffer in = put(logits_, {n, V});
    backend_->ask_samples(rows);
    backend_->draw_samples(in.mat<float>(n, V));
    std::vector<Sample> samples;
    for (std::optional<Sample>& sample : backend_->take_samples(in.mat<const float>(n, V)))
      samples.push_back(std::move(sample.value()));
    give(host, in, n * V);
    return samples;
  }

 private:
  static constexpr int64_t kMaxRows = 8192;
  using Fill = std::function<void(Mat<float> q, const KvLayer& cache, Mat<const float> in, const RopeTable& rope)>;

  // fill, then attention, for rows [n, width] of sequences on a fresh cache.           out, q (or null): [n, heads*64]
  void attend(const BorrowedTensor& out, float* queries, const float* rows, int64_t width, const BorrowedTensor& positions,
              const std::vector<int64_t>& lengths, const BorrowedTensor& sinks, const ModelConfig& config, int64_t chunk,
              const Fill& fill) {
    const int64_t n = extent(positions, 0), q_size = config.q_size(), kv_heads = config.n_kv_heads;
    float* result = out.data<float>(DType::F32, {n, q_size});
    const int32_t* ids = positions.data<int32_t>(DType::I32, {n});
    const Buffer sink = put(sinks, {config.n_heads});
    int64_t end = 0, total = 0;
    for (int64_t i = 0; i < n; ++i) end = std::max<int64_t>(end, ids[i] + 1);
    for (int64_t length : lengths) total += length;
    CHECK(total == n, "sequence_lengths: they add up to ", total, ", not ", n, " rows");
    backend_->reserve(config, {kMaxRows, static_cast<int64_t>(lengths.size()), end});
    std::vector<float> cos(end * 32), sin(end * 32);
    fill_rope_table(config, 0, end, cos.data(), sin.data());
    const Buffer cos_ = put(cos), sin_ = put(sin);
    const RopeTable rope{cos_.mat<const float>(end, 32), sin_.mat<const float>(end, 32)};
    const int64_t n_pages = (n / kPageTokens + 2) * static_cast<int64_t>(lengths.size()) + 2;
    KvCache cache(*backend_, config, n_pages, n_pages);
    std::vector<SequenceCache> sequences(lengths.size());

    std::vector<int64_t> starts, done(lengths.size(), 0);
    for (int64_t i = 0, at = 0; i < static_cast<int64_t>(lengths.size()); at += lengths[i++]) starts.push_back(at);
    for (bool more = true; more;) {  // one round: a chunk of every sequence that has rows left
      more = false;
      Batch batch;
      std::vector<int64_t> source;
      for (size_t s = 0; s < lengths.size(); ++s) {
        const int64_t count = std::min(chunk > 0 ? chunk : lengths[s], lengths[s] - done[s]);
        if (count <= 0) continue;
        CHECK(ids[starts[s] + done[s]] == sequences[s].length, "positions: sequence ", s, " must count up from 0");
        cache.extend(sequences[s], count);
        batch.sequences.push_back({batch.n_tokens(), count, sequences[s].length, &sequences[s].full, &sequences[s].window});
        for (int64_t i = 0; i < count; ++i) {
          batch.tokens.push_back(0);
          batch.positions.push_back(ids[starts[s] + done[s] + i]);
          batch.sequence_of.push_back(static_cast<int32_t>(batch.sequences.size()) - 1);
          source.push_back(starts[s] + done[s] + i);
        }
        done[s] += count;
        more = more || done[s] < lengths[s];
      }
      const int64_t m = batch.n_tokens();
      std::vector<float> gathered;
      for (int64_t row : source) gathered.insert(gathered.end(), rows + row * width, rows + (row + 1) * width);
      const Buffer in = put(gathered);
      Buffer q = take(m * q_size), a = take(m * q_size);
      backend_->begin(batch);
      fill(q.mat<float>(m, q_size), cache.layer(0), in.mat<const float>(m, width), rope);
      backend_->attention(a.mat<float>(m, q_size), q.mat<const float>(m, q_size), cache.layer(0), sink.as<float>(), kv_heads);
      std::vector<float> values(m * q_size);
      for (auto [from, to] : {std::pair{&a, result}, std::pair{&q, queries}}) {
        if (!to) continue;
        give(values.data(), *from, m * q_size);
        for (int64_t i = 0; i < m; ++i) std::copy_n(values.data() + i * q_size, q_size, to + source[i] * q_size);
      }
      size_t s_index = 0;
      for (size_t s = 0; s < lengths.size(); ++s)
        if (s_index < batch.sequences.size() && batch.sequences[s_index].full_pages == &sequences[s].full)
          cache.commit(sequences[s], batch.sequences[s_index++].n_rows);
    }
  }

  static int64_t extent(const BorrowedTensor& tensor, size_t d) {
    CHECK(tensor.view().shape.size() > d, tensor.view().name, ": it needs ", d + 1, " dimensions or more");
    return tensor.view().shape[d];
  }
  struct Experts {
    Weight gate_up, down;
    Buffer gate_up_bias, down_bias;

    ExpertWeights view(float limit) const { return {&gate_up, gate_up_bias.as<float>(), &down, down_bias.as<float>(), limit}; }
  };
  Experts make_experts(const std::vector<py::object>& parts) {
    CHECK(parts.size() == 6, "experts: blocks, scales and bias of gate_up, then of down, not ", parts.size(), " tensors");
    const char* names[] = {"gate_up_blocks", "gate_up_scales", "gate_up_bias", "down_blocks", "down_scales", "down_bias"};
    std::vector<std::unique_ptr<BorrowedTensor>> p;
    for (size_t i = 0; i < parts.size(); ++i) p.push_back(std::make_unique<BorrowedTensor>(parts[i], names[i]));
    const int64_t E = extent(*p[0], 0), I = extent(*p[0], 1) / 2, H = extent(*p[3], 1);
    return {make_mxfp4(*p[0], *p[1], E, 2 * I, H, RowOrder::kGateUp), make_mxfp4(*p[3], *p[4], E, H, I, RowOrder::kPlain),
            put(*p[2], {E, 2 * I}), put(*p[5], {E, H})};
  }
  Buffer take(int64_t floats) { return backend_->allocate(floats * sizeof(float)); }
  Buffer put(const std::vector<float>& values) {
    Buffer buffer = take(static_cast<int64_t>(values.size()));
    backend_->copy_in(buffer.data(), values.data(), values.size() * sizeof(float));
    return buffer;
  }
  Buffer put(const BorrowedTensor& tensor, const std::vector<int64_t>& shape) {
    const float* data = tensor.data<float>(DType::F32, shape);
    int64_t n = 1;
    for (int64_t e : shape) n *= e;
    return put(std::vector<float>(data, data + n));
  }
  template <class T>
  void give(T* host, const Buffer& buffer, int64_t n) {
    backend_->synchronize();
    backend_->copy_out(host, buffer.data(), n * sizeof(T));
  }
  void reserve(int64_t hidden, int64_t intermediate, int64_t experts, int64_t k) {
    ModelConfig config;
    config.hidden_size = hidden;
    config.intermediate_size = intermediate;
    config.n_experts = experts;
    config.experts_per_token = k;
    config.n_heads = config.n_kv_heads = 1;
    backend_->reserve(config, {kMaxRows, 1, 1});
  }
  // A batch of so many rows, of which nothing else is said.
  void begin_rows(int64_t n) {
    Batch batch;
    batch.tokens.assign(n, 0);
    backend_->begin(batch);
  }
  Weight make_rows(WeightFormat format, const BorrowedTensor& rows) {
    rows.data<uint16_t>(DType::BF16, {kAny, kAny});
    Weight weight = backend_->make_weight(format, 1, rows.view().shape[0], rows.view().shape[1], RowOrder::kPlain);
    backend_->load_rows(weight, 0, rows.view());
    return weight;
  }
  Weight make_mxfp4(const BorrowedTensor& blocks, const BorrowedTensor& scales, int64_t E, int64_t rows, int64_t cols,
                    RowOrder order) {
    std::vector<int64_t> shape = {rows, cols / 32, 16};
    if (blocks.view().shape.size() == 4) shape.insert(shape.begin(), E);
    CHECK(cols % 32 == 0, blocks.view().name, ": ", cols, " inputs are not a multiple of 32");
    blocks.data<uint8_t>(DType::U8, shape);
    shape.pop_back();
    scales.data<uint8_t>(DType::U8, shape);
    Weight weight = backend_->make_weight(WeightFormat::kMxfp4, E, rows, cols, order);
    backend_->load_mxfp4_blocks(weight, blocks.view());
    backend_->load_mxfp4_scales(weight, scales.view());
    return weight;
  }
  void product(const BorrowedTensor& out, const BorrowedTensor& x, const Weight& weight, py::object bias, bool add, int64_t n,
               int64_t M, int64_t K) {
    float* result = out.data<float>(DType::F32, {n, M});
    reserve(K, 32, 1, 1);
    Buffer b;
    if (!bias.is_none()) b = put(BorrowedTensor(bias, "bias"), {M});
    const Buffer in = put(x, {n, K});
    Buffer y = put(out, {n, M});
    if (add)
      backend_->linear_add(y.mat<float>(n, M), in.mat<const float>(n, K), weight, b.as<float>());
    else
      backend_->linear(y.mat<float>(n, M), in.mat<const float>(n, K), weight, b.as<float>());
    give(result, y, n * M);
  }

  std::unique_ptr<Backend> backend_;
};

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<Ops>(m, "Ops", "Single operations of a backend, for tests. Results are written into the output tensors.")
      .def(py::init<const std::string&, const std::string&, int, const std::string&, bool>(), "device"_a = "cpu", "isa"_a = "",
           "threads"_a = 1, "precision"_a = "exact", "invariant"_a = true)
      .def_property_readonly("isa", &Ops::isa)
      .def("embed", &Ops::embed, "out"_a, "tokens"_a, "table"_a)
      .def("rmsnorm", &Ops::rmsnorm, "out"_a, "x"_a, "weight"_a, "eps"_a)
      .def("linear", &Ops::linear, "out"_a, "x"_a, "weight"_a, "bias"_a, "add"_a = false)
      .def("mxfp4_linear", &Ops::mxfp4_linear, "out"_a, "x"_a, "blocks"_a, "scales"_a)
      .def("attention", &Ops::attention, "out"_a, "qkv"_a, "positions"_a, "sequence_lengths"_a, "sinks"_a, "window"_a,
           "config"_a, "chunk"_a = 0)
      .def("route", &Ops::route, "ids"_a, "weights"_a, "t"_a, "weight"_a, "bias"_a)
      .def("moe", &Ops::moe, "x"_a, "t"_a, "ids"_a, "weights"_a, "gate_up_blocks"_a, "gate_up_scales"_a, "gate_up_bias"_a,
           "down_blocks"_a, "down_scales"_a, "down_bias"_a, "limit"_a)
      .def("sample", &Ops::sample, "logits"_a, "samplers"_a, "positions"_a)
      .def("qkv_attention", &Ops::qkv_attention, "out"_a, "q"_a, "x"_a, "norm"_a, "eps"_a, "weight"_a, "bias"_a, "positions"_a,
           "sequence_lengths"_a, "sinks"_a, "window"_a, "config"_a, "chunk"_a, "fused"_a)
      .def("mlp", &Ops::mlp, "x"_a, "t"_a, "ids"_a, "weights"_a, "norm"_a, "eps"_a, "router"_a, "router_bias"_a, "experts"_a,
           "limit"_a, "fused"_a, "padding"_a = 0);
}

}  // namespace gptoss

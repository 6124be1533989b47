// The operations of a step on a card: which kernel takes each, and with what. What a kernel computes and how its work is
// divided stands with it.
#include <algorithm>

#include "cuda/backend.cuh"

namespace gptoss::cuda {

// ------------------------------------------------------------------------------------------------------- rounded rows

Rounded CudaBackend::rounded(int64_t rows, int64_t cols) {
  const int64_t stride = round_up(cols, 64);
  ensure(rounded_, rows * stride * 2);
  return {rounded_.as<uint16_t>(), stride};
}

void CudaBackend::remember(Mat<const float> t) {
  rounded_of_ = t.data;
  rounded_rows_ = t.rows;
  rounded_cols_ = t.cols;
}

Rounded CudaBackend::rounded_input(Mat<const float> t) {
  const Rounded result = rounded(t.rows, t.cols);
  if (rounded_of_ == t.data && rounded_rows_ >= t.rows && rounded_cols_ == t.cols) return result;
  round_rows(result, t.data, t.rows, t.cols, *stream_);
  remember(t);
  return result;
}

Rounded CudaBackend::packed(Rounded x, const int32_t* slots, int32_t gather, int64_t n) {
  ensure(packed_, n * x.stride * 2);
  const Rounded result = {packed_.as<uint16_t>(), x.stride};
  hopper_pack(result, x, slots, gather, batch_.n_rows, n, *stream_);
  return result;
}

Rounded CudaBackend::product_input(Mat<const float> t, int64_t tile) {
  const Rounded rows = rounded_input(t);
  return tile == kHopperTokens ? packed(rows, nullptr, 0, t.rows) : rows;
}

// ------------------------------------------------------------------------------------------- norm, products, rotation

void CudaBackend::embed(Mat<float> x, const Weight& table) {
  use();
  forget(x.data);
  cuda::embed(x.data, batch_.tokens, table.storage.as<uint16_t>(), x.rows, x.cols, *stream_);
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

int64_t CudaBackend::row_tile(int64_t rows, int64_t cols) const {
  return hopper_ && hopper_pays(rows, 1) ? kHopperTokens : matmul_tile(rows, cols);
}

int64_t CudaBackend::expert_tile(int64_t slots, int64_t experts) const {
  return hopper_ && hopper_pays(slots, experts) ? kHopperTokens : matmul_tile(ceil_div(slots, experts), expert_cols_);
}

MatmulArgs CudaBackend::matmul_args(const Weight& weight, const float* bias, int64_t n) const {
  MatmulArgs args;
  args.codes = weight.storage.as<uint8_t>();
  args.scales = args.codes + arranged_scales_offset(weight.experts, weight.rows, weight.cols);
  args.rows = weight.rows;
  args.cols = weight.cols;
  args.order = weight.order;
  args.n = n;
  args.bias = bias;
  return args;
}

void CudaBackend::multiply(const MatmulArgs& args, bool mxfp4, Epilogue epilogue, int64_t tile) {
  if (tile == kHopperTokens)
    hopper_matmul(args, mxfp4, epilogue, properties_.multiProcessorCount, *stream_);
  else
    matmul(args, mxfp4, epilogue, tile, *stream_);
}

void CudaBackend::product(Mat<float> out, Mat<const float> t, const Weight& weight, const float* bias, Epilogue epilogue) {
  use();
  MatmulArgs args = matmul_args(weight, bias, t.rows);
  args.out = out.data;
  const int64_t tile = row_tile(t.rows, t.cols);
  args.x = product_input(t, tile);
  multiply(args, weight.format == WeightFormat::kMxfp4, epilogue, tile);
  forget(out.data);
}

RopeArgs CudaBackend::rope_args(Mat<float> q, const KvLayer& cache, const RopeTable& rope, int64_t kv_heads) const {
  RopeArgs args;
  args.q = q.data;
  args.keys = static_cast<uint16_t*>(cache.keys);
  args.values = static_cast<uint16_t*>(cache.values);
  args.cos = rope.cos.data;
  args.sin = rope.sin.data;
  args.batch = batch_;
  args.window = cache.window > 0;
  args.heads = static_cast<int32_t>(q.cols / kHeadDim);
  args.kv_heads = static_cast<int32_t>(kv_heads);
  return args;
}

void CudaBackend::rope_append(Mat<float> q, const KvLayer& cache, Mat<const float> qkv, const RopeTable& rope,
                              int64_t kv_heads) {
  use();
  forget(q.data);
  cuda::rope_append(rope_args(q, cache, rope, kv_heads), qkv.data, q.rows, *stream_);
}

// Few rows are normed by every block of the product; more, once before it.
void CudaBackend::norm_qkv(Mat<float> q, const KvLayer& cache, Mat<const float> x, const Norm& norm, const Weight& weight,
                           const float* bias, const RopeTable& rope, int64_t kv_heads, Mat<float> t, Mat<float>) {
  use();
  CHECK(weight.order == RowOrder::kRopePairs, "norm_qkv takes a weight whose rows are ordered for the rotation");
  MatmulArgs args = matmul_args(weight, bias, x.rows);
  args.rope = rope_args(q, cache, rope, kv_heads);
  const int64_t tile = row_tile(x.rows, x.cols);
  if (tile != kNarrowTile) {
    rmsnorm(t, x, norm.weight, norm.eps, nullptr);
    args.x = product_input({t.data, t.rows, t.cols}, tile);
  }
  args.residual = x.data;
  args.norm_weight = norm.weight;
  args.eps = norm.eps;
  multiply(args, false, Epilogue::kRope, tile);
  forget(q.data);
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
  args.heads = q.cols / kHeadDim;
  args.kv_heads = kv_heads;
  args.window = cache.window;
  args.max_pages = pages_seen(cache.window);
  args.multiprocessors = properties_.multiProcessorCount;
  reserve_attention(batch_.n_single_rows, args.heads, kv_heads, args.max_pages * kPageTokens);
  args.workspace = attention_space_.data();
  args.workspace_bytes = static_cast<int64_t>(attention_space_.bytes());
  cuda::attention(args, *stream_);
  remember({out.data, out.rows, out.cols});
}

// ------------------------------------------------------------------------------------------------------------ experts

RouteArgs CudaBackend::route_args(Routing top, Mat<const float> x, const Weight& weight, const float* bias) {
  dispatched_ = nullptr;
  RouteArgs args;
  args.ids = top.experts.data;
  args.weights = top.weights.data;
  args.x = x.data;
  args.router = weight.storage.as<uint16_t>();
  args.bias = bias;
  args.n = x.rows;
  args.hidden = x.cols;
  args.experts = weight.rows;
  args.k = top.experts.cols;
  args.n_rows = batch_.n_rows;
  args.logits = router_logits_.as<float>();
  args.counters = counters_.as<unsigned>();
  return args;
}

void CudaBackend::route(Routing top, Mat<const float> t, const Weight& weight, const float* bias) {
  use();
  cuda::route(route_args(top, t, weight, bias), *stream_);
}

DispatchArgs CudaBackend::dispatch_args(int64_t tile) const {
  return {slots_.as<int32_t>(), tiles_.as<TokenTile>(), n_tiles_.as<int32_t>(), static_cast<int32_t>(tile)};
}

void CudaBackend::norm_route(Routing top, Mat<float> t, Mat<const float> x, const Norm& norm, const Weight& weight,
                             const float* bias) {
  use();
  RouteArgs args = route_args(top, x, weight, bias);
  args.norm_weight = norm.weight;
  args.eps = norm.eps;
  args.t = t.data;
  args.rounded = rounded(t.rows, t.cols);
  const int64_t slots = top.experts.size();
  if (routes_and_dispatches(slots)) {
    args.dispatch = dispatch_args(expert_tile(slots, weight.rows));
    dispatched_ = top.experts.data;
  }
  cuda::route(args, *stream_);
  remember({t.data, t.rows, t.cols});
}

void CudaBackend::moe_add(Mat<float> x, Mat<const float> t, const Routing& top, const ExpertWeights& experts) {
  use();
  const Weight &gate_up = *experts.gate_up, &down = *experts.down;
  const int64_t k = top.experts.cols, slots = t.rows * k, n_experts = gate_up.experts;
  const int64_t tile = expert_tile(slots, n_experts);
  const DispatchArgs sorted = dispatch_args(tile);
  const Rounded rows = rounded_input(t), hidden = {hidden_.as<uint16_t>(), round_up(down.cols, 64)};
  if (dispatched_ != top.experts.data) dispatch(sorted, top.experts.data, slots, n_experts, *stream_);
  dispatched_ = nullptr;
  const auto grouped = [&](const Weight& weight, const float* bias) {
    MatmulArgs args = matmul_args(weight, bias, t.rows);
    args.tiles = sorted.tiles;
    args.n_tiles = sorted.n_tiles;
    args.max_tiles = max_tiles(slots, n_experts, tile);
    args.slots = sorted.slots;
    args.choices = static_cast<int32_t>(k);
    args.n_rows = batch_.n_rows;
    return args;
  };
  MatmulArgs up = grouped(gate_up, experts.gate_up_bias);
  up.x = tile == kHopperTokens ? packed(rows, sorted.slots, up.choices, slots) : rows;
  up.gather = true;
  up.hidden = hidden;
  up.limit = experts.swiglu_limit;
  multiply(up, true, Epilogue::kSwiglu, tile);

  MatmulArgs last = grouped(down, experts.down_bias);
  last.x = hidden;
  last.out = x.data;
  last.parts = outputs_.as<float>();
  last.shares = top.weights.data;
  last.counters = counters_.as<unsigned>();
  multiply(last, true, Epilogue::kCombine, tile);
  forget(x.data);
}

}  // namespace gptoss::cuda

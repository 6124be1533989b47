// _gptoss: the core as Python sees it. Tensors are borrowed by DLPack; the GIL is released wherever something is computed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "bindings/bindings.h"
#include "bindings/dlpack.h"
#include "cpu/attention_plan.h"
#include "cpu/isa.h"
#include "model.h"

namespace py = pybind11;
using namespace py::literals;

namespace gptoss {
namespace {

// A sequence may go while another thread is in a step, which wants the GIL now and then: so its lock is taken without it.
class PySequence {
 public:
  explicit PySequence(std::shared_ptr<Model> model) : sequence_(std::make_unique<Sequence>(std::move(model))) {}
  ~PySequence() {
    py::gil_scoped_release release;
    sequence_.reset();
  }
  Sequence& get() { return *sequence_; }

 private:
  std::unique_ptr<Sequence> sequence_;
};

// Lets Python's signal handlers (Ctrl-C) run between layers, at most every 20 ms.
class SignalPoll {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(20)) return;
    last_ = now;
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

std::vector<int32_t> token_list(py::handle tokens) {
  std::vector<int32_t> ids;
  if (py::isinstance<py::buffer>(tokens)) {
    const py::buffer_info info = py::reinterpret_borrow<py::buffer>(tokens).request();
    CHECK(info.ndim == 1 && info.item_type_is_equivalent_to<int32_t>() && info.strides[0] == 4,
          "tokens must be a list of ints or a contiguous one-dimensional int32 array");
    const auto* data = static_cast<const int32_t*>(info.ptr);
    return {data, data + info.size};
  }
  for (py::handle token : tokens) {
    CHECK(PyLong_Check(token.ptr()) && !PyBool_Check(token.ptr()), "tokens must be ints, not ",
          py::cast<std::string>(py::repr(token)));
    int overflow = 0;
    const long long id = PyLong_AsLongLongAndOverflow(token.ptr(), &overflow);
    CHECK(!overflow && id >= INT32_MIN && id <= INT32_MAX, "token id ", py::cast<std::string>(py::repr(token)),
          " is out of range");
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

void allow(Sampler& sampler, const py::object& mask) {
  if (mask.is_none()) return sampler.allow(nullptr);
  const int64_t words = Sampler::mask_words(sampler.vocab_size());
  CHECK(py::isinstance<py::buffer>(mask), "mask must be None or an array of uint32");
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(mask).request();
  CHECK(info.ndim == 1 && info.item_type_is_equivalent_to<uint32_t>() && info.strides[0] == 4 && info.size == words,
        "mask must be a contiguous one-dimensional uint32 array of ", words, " words, one bit for each token");
  sampler.allow(static_cast<const uint32_t*>(info.ptr));
}

std::vector<std::vector<Sample>> step(Model& model, const py::list& items, const py::object& logits) {
  std::vector<StepItem> steps;
  int64_t n_wanted = 0;
  for (py::handle entry : items) {
    CHECK(py::isinstance<py::tuple>(entry) && (py::len(entry) == 4 || py::len(entry) == 5),
          "an item must be a tuple (sequence, tokens, want, sampler) or (sequence, tokens, want, sampler, n_drafts)");
    const auto fields = py::reinterpret_borrow<py::tuple>(entry);
    const auto [sequence, tokens, want, sampler] =
        py::cast<std::tuple<PySequence*, py::object, int, Sampler*>>(fields[py::slice(0, 4, 1)]);
    CHECK(want >= 0 && want <= 2, "want must be 0, 1 or 2, not ", want);
    CHECK(sequence, "a sequence must not be None");
    steps.push_back({&sequence->get(), token_list(tokens), static_cast<Want>(want), sampler,
                     fields.size() > 4 ? py::cast<int64_t>(fields[4]) : 0});
    n_wanted += steps.back().n_logits();
  }
  std::optional<BorrowedTensor> out;
  float* rows = nullptr;
  if (!logits.is_none()) {
    out.emplace(logits, "logits");
    rows = out->data<float>(DType::F32, {n_wanted, model.config().vocab_size});
  }
  py::gil_scoped_release release;
  SignalPoll poll;
  return model.step(steps, rows, std::ref(poll));
}

void bind_config(py::module_& m) {
  py::class_<ModelConfig>(m, "Config")
      .def(py::init([](int64_t hidden_size, int64_t n_layers, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                       int64_t n_experts, int64_t experts_per_token, int64_t intermediate_size, int64_t vocab_size,
                       int64_t max_context, double rms_norm_eps, double rope_theta, double rope_factor,
                       int64_t rope_original_context, double rope_beta_fast, double rope_beta_slow, bool rope_truncate,
                       double rope_attention_factor, double swiglu_limit, std::vector<int64_t> layer_windows) {
             ModelConfig c{hidden_size,       n_layers,
                           n_heads,           n_kv_heads,
                           head_dim,          n_experts,
                           experts_per_token, intermediate_size,
                           vocab_size,        max_context,
                           rms_norm_eps,      rope_theta,
                           rope_factor,       rope_original_context,
                           rope_beta_fast,    rope_beta_slow,
                           rope_truncate,     rope_attention_factor,
                           swiglu_limit,      std::move(layer_windows)};
             c.validate();
             return c;
           }),
           py::kw_only(), "hidden_size"_a, "n_layers"_a, "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "n_experts"_a,
           "experts_per_token"_a, "intermediate_size"_a, "vocab_size"_a, "max_context"_a, "rms_norm_eps"_a, "rope_theta"_a,
           "rope_factor"_a, "rope_original_context"_a, "rope_beta_fast"_a, "rope_beta_slow"_a, "rope_truncate"_a,
           "rope_attention_factor"_a, "swiglu_limit"_a, "layer_windows"_a)
      .def_readonly("hidden_size", &ModelConfig::hidden_size)
      .def_readonly("n_layers", &ModelConfig::n_layers)
      .def_readonly("n_heads", &ModelConfig::n_heads)
      .def_readonly("n_kv_heads", &ModelConfig::n_kv_heads)
      .def_readonly("head_dim", &ModelConfig::head_dim)
      .def_readonly("n_experts", &ModelConfig::n_experts)
      .def_readonly("experts_per_token", &ModelConfig::experts_per_token)
      .def_readonly("intermediate_size", &ModelConfig::intermediate_size)
      .def_readonly("vocab_size", &ModelConfig::vocab_size)
      .def_readonly("max_context", &ModelConfig::max_context)
      .def_readonly("rms_norm_eps", &ModelConfig::rms_norm_eps)
      .def_readonly("rope_theta", &ModelConfig::rope_theta)
      .def_readonly("rope_factor", &ModelConfig::rope_factor)
      .def_readonly("rope_original_context", &ModelConfig::rope_original_context)
      .def_readonly("rope_beta_fast", &ModelConfig::rope_beta_fast)
      .def_readonly("rope_beta_slow", &ModelConfig::rope_beta_slow)
      .def_readonly("rope_truncate", &ModelConfig::rope_truncate)
      .def_readonly("rope_attention_factor", &ModelConfig::rope_attention_factor)
      .def_readonly("swiglu_limit", &ModelConfig::swiglu_limit)
      .def_readonly("layer_windows", &ModelConfig::layer_windows);

  py::class_<TensorSpec>(m, "TensorSpec")
      .def_readonly("name", &TensorSpec::name)
      .def_readonly("shape", &TensorSpec::shape)
      .def_property_readonly("dtypes", [](const TensorSpec& spec) {
        std::vector<std::string> names;
        for (DType dtype : spec.dtypes) names.emplace_back(dtype_name(dtype));
        return names;
      });
  m.def(
      "expected_tensors",
      [](const ModelConfig& config, const std::string& layout) {
        CHECK(layout == "huggingface" || layout == "original", "layout must be \"huggingface\" or \"original\", not \"", layout,
              "\"");
        return expected_tensors(config, layout == "original" ? Layout::kOriginal : Layout::kHuggingFace);
      },
      "config"_a, "layout"_a, "Every tensor that a checkpoint of this shape and layout must have.");
}

void register_cannot_sample(py::module_& m) {
  static const py::exception<CannotSample> type(m, "CannotSample", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const CannotSample& error) {
      const py::object value = py::handle(type)(error.what());
      value.attr("item") = error.item;
      PyErr_SetObject(type.ptr(), value.ptr());
    }
  });
}

void bind_sampling(py::module_& m) {
  register_cannot_sample(m);
  py::class_<Sample>(m, "Sample")
      .def_readonly("token", &Sample::token)
      .def_readonly("logprob", &Sample::logprob)
      .def_readonly("top", &Sample::top);
  py::class_<Sampler>(m, "Sampler")
      .def(py::init([](int64_t vocab_size, double temperature, int64_t top_k, double top_p, double min_p,
                       double repetition_penalty, double presence_penalty, double frequency_penalty,
                       std::map<int64_t, double> logit_bias, uint64_t seed, int64_t logprobs) {
             return Sampler(vocab_size, {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                                         frequency_penalty, std::move(logit_bias), seed, logprobs});
           }),
           "vocab_size"_a, py::kw_only(), "temperature"_a = 1.0, "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0,
           "repetition_penalty"_a = 1.0, "presence_penalty"_a = 0.0, "frequency_penalty"_a = 0.0,
           "logit_bias"_a = std::map<int64_t, double>{}, "seed"_a = 0, "logprobs"_a = -1)
      .def("observe_prompt",
           [](Sampler& sampler, py::object tokens) {
             const std::vector<int32_t> ids = token_list(tokens);
             sampler.observe_prompt(ids.data(), static_cast<int64_t>(ids.size()));
           })
      .def("record", &Sampler::record, "token"_a)
      .def("allow", &allow, "mask"_a)
      .def(
          "sample",
          [](const Sampler& sampler, py::object logits, int64_t position) {
            const BorrowedTensor row(logits, "logits");
            const float* data = row.data<float>(DType::F32, {sampler.vocab_size()});
            py::gil_scoped_release release;
            return sampler.sample(data, position);
          },
          "logits"_a, "position"_a);
  py::class_<StopMatcher>(m, "StopMatcher")
      .def(py::init<std::vector<std::string>>(), "stops"_a)
      .def(
          "push",
          [](StopMatcher& matcher, const std::string& text) {
            StopMatcher::Result result = matcher.push(text);
            return std::make_pair(std::move(result.text), result.stopped);
          },
          "text"_a)
      .def("flush", &StopMatcher::flush);
}

void bind_core(py::module_& m) {
  py::register_exception<CacheFull>(m, "CacheFull", PyExc_RuntimeError);
  py::class_<PySequence>(m, "Sequence")
      .def_property_readonly("length", [](PySequence& s) { return s.get().length(); })
      .def(
          "truncate", [](PySequence& s, int64_t length) { s.get().truncate(length); }, "length"_a,
          py::call_guard<py::gil_scoped_release>())
      .def(
          "reuse",
          [](PySequence& s, const py::object& tokens) {
            const std::vector<int32_t> ids = token_list(tokens);
            py::gil_scoped_release release;
            return s.get().reuse(ids);
          },
          "tokens"_a)
      .def("close", [](PySequence& s) { s.get().close(); }, py::call_guard<py::gil_scoped_release>());

  py::class_<Model, std::shared_ptr<Model>>(m, "Core")
      .def(py::init([](const ModelConfig& config, const std::string& device, int threads, int64_t max_context,
                       int64_t max_batch_tokens, int64_t max_sequences, bool invariant, const std::string& precision,
                       bool prefix_cache) {
             CHECK(threads >= 0, "threads must be 0 (as many as may be used) or more, not ", threads);
             CHECK(max_context >= 0, "max_context must be positive, not ", max_context);
             ModelOptions options;
             CHECK(max_sequences >= 0, "max_sequences must be positive, not ", max_sequences);
             options.backend = {device, threads, "", max_batch_tokens, invariant};
             options.backend.precision = precision_of(precision);
             options.max_context = max_context;
             options.max_sequences = max_sequences;
             options.prefix_cache = prefix_cache;
             py::gil_scoped_release release;
             return std::make_shared<Model>(config, options);
           }),
           "config"_a, "device"_a = "cpu", "threads"_a = 0, "max_context"_a = 0, "max_batch_tokens"_a = 512,
           "max_sequences"_a = 0, "invariant"_a = false, "precision"_a = "exact", "prefix_cache"_a = false)
      .def(
          "load_tensor",
          [](Model& model, const std::string& name, py::object tensor) {
            const BorrowedTensor borrowed(tensor, name);
            py::gil_scoped_release release;
            model.load(borrowed.view());
          },
          "name"_a, "tensor"_a)
      .def("finish_loading", &Model::finish_loading, py::call_guard<py::gil_scoped_release>())
      .def("new_sequence", [](std::shared_ptr<Model> model) { return std::make_unique<PySequence>(std::move(model)); })
      .def("step", &step, "items"_a, "logits"_a = py::none())
      .def("memory",
           [](const Model& model) {
             return std::map<std::string, int64_t>{{"weights", model.weight_bytes()},
                                                   {"cache_used", model.cache().bytes_in_use()},
                                                   {"workspace", model.workspace_bytes()}};
           })
      .def("free_pages", [](const Model& model) { return model.cache().free_pages(); })
      .def("cache_stats",
           [](const Model& model) {
             const CacheStats stats = model.cache().stats();
             return std::map<std::string, int64_t>{{"full_in_use", stats.full_in_use},
                                                   {"window_in_use", stats.window_in_use},
                                                   {"cached_pages", stats.cached_pages},
                                                   {"prefix_tokens_asked", stats.prefix_tokens_asked},
                                                   {"prefix_tokens_reused", stats.prefix_tokens_reused}};
           })
      .def_property_readonly("page_tokens", [](const Model&) { return kPageTokens; })
      .def_property_readonly("full_pages", [](const Model& model) { return model.cache().full_pages(); })
      .def_property_readonly("window_pages", [](const Model& model) { return model.cache().window_pages(); })
      .def_property_readonly("config", &Model::config)
      .def_property_readonly("device", [](const Model& model) { return model.backend().device(); })
      .def_property_readonly("isa", [](const Model& model) { return model.backend().isa(); })
      .def_property_readonly("precision", [](const Model& model) { return precision_name(model.precision()); })
      .def_property_readonly("threads", [](const Model& model) { return model.backend().threads(); })
      .def_property_readonly("max_context", &Model::max_context)
      .def_property_readonly("max_batch_tokens", &Model::max_batch_tokens)
      .def_property_readonly("max_sequences", &Model::max_sequences);
}

std::vector<int64_t> attention_parts(const std::vector<int32_t>& positions, int64_t window, int64_t kv_heads, int64_t threads) {
  CHECK(kv_heads >= 1 && threads >= 1, "kv_heads and threads must be positive, not ", kv_heads, " and ", threads);
  cpu::AttentionPlan plan;
  plan.make(positions.data(), std::ssize(positions), window, kv_heads, threads);
  std::vector<int64_t> parts;
  for (const cpu::AttentionRow& row : plan.rows()) parts.push_back(row.parts);
  return parts;
}

}  // namespace

PYBIND11_MODULE(_gptoss, m) {
  m.doc() = "The gptoss core: the forward pass of gpt-oss in C++.";
  m.attr("__version__") = GPTOSS_VERSION;
  bind_config(m);
  bind_sampling(m);
  bind_core(m);
  bind_ops(m);
  m.def("isa_names", &cpu::isa_names, "Instruction sets this build has kernels for, plainest first.");
  m.def("supported_isas", &cpu::supported_isas, "Those of them this machine runs.");
  m.def("attention_parts", &attention_parts, "positions"_a, "window"_a, "kv_heads"_a, "threads"_a,
        "Into how many parts the CPU cuts the keys of rows at these positions, each, for tests.");
  m.def("active_isa", [] { return std::string(cpu::select_kernels("").name); }, "The one used now; GPTOSS_ISA forces one.");
  m.def("cuda_available", &cuda_available);
  m.def("build_info", [] {
    return std::map<std::string, std::string>{
        {"version", GPTOSS_VERSION}, {"compiler", GPTOSS_COMPILER}, {"cuda", GPTOSS_CUDA_KIND}};
  });
}

}  // namespace gptoss

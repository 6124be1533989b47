// The DLPack ABI, as far as it is needed to borrow a CPU tensor for the time of a call (dmlc/dlpack, version 0 struct).
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "check.h"
#include "tensor.h"

namespace gptoss {

extern "C" {
struct DLDevice {
  int32_t device_type;  // 1: CPU
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;  // 0 int, 1 unsigned, 2 float, 4 bfloat
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};
}

// Holds a tensor's capsule, and so its memory, while the view is used.
class BorrowedTensor {
 public:
  BorrowedTensor(pybind11::handle object, const std::string& name) {
    CHECK(pybind11::hasattr(object, "__dlpack__"), name, ": not a tensor (it has no __dlpack__)");
    capsule_ = object.attr("__dlpack__")();
    auto* tensor = static_cast<DLTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
    if (!tensor) throw pybind11::error_already_set();
    CHECK(tensor->device.device_type == 1, name, ": the tensor must be in CPU memory");
    view_.name = name;
    view_.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
    view_.dtype = dtype_of(tensor->dtype, name);
    view_.shape.assign(tensor->shape, tensor->shape + tensor->ndim);
    int64_t expected = 1;
    for (int32_t d = tensor->ndim - 1; d >= 0; --d) {
      CHECK(!tensor->strides || tensor->shape[d] == 1 || tensor->strides[d] == expected, name,
            ": the tensor must be contiguous");
      expected *= tensor->shape[d];
    }
  }

  const HostTensor& view() const { return view_; }

  // The data, if dtype and shape are these; an extent of -1 is free.
  template <class T>
  T* data(DType dtype, const std::vector<int64_t>& shape) const {
    CHECK(view_.dtype == dtype, view_.name, ": its dtype is ", dtype_name(view_.dtype), ", but must be ", dtype_name(dtype));
    bool same = view_.shape.size() == shape.size();
    for (size_t d = 0; same && d < shape.size(); ++d) same = shape[d] == -1 || shape[d] == view_.shape[d];
    CHECK(same, view_.name, ": its shape is ", view_.shape, ", but must be ", shape);
    return static_cast<T*>(const_cast<void*>(view_.data));
  }

 private:
  static DType dtype_of(DLDataType type, const std::string& name) {
    if (type.lanes == 1) {
      if (type.code == 2 && type.bits == 32) return DType::F32;
      if (type.code == 4 && type.bits == 16) return DType::BF16;
      if (type.code == 1 && type.bits == 8) return DType::U8;
      if (type.code == 0 && type.bits == 32) return DType::I32;
    }
    CHECK(false, name, ": dtype not supported; use float32, bfloat16, uint8 or int32");
    return DType::F32;
  }

  pybind11::object capsule_;
  HostTensor view_;
};

}  // namespace gptoss

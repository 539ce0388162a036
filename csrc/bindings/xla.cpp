// The operations as custom calls of XLA on the CPU. Arguments: boxes (K, 4), image_index (K,) of
// int32, then what the operation takes; the attributes are the numbers of the rule, as float64.
// Nothing is taken on trust: what does not fit is an error of XLA's, and no exception leaves a
// handler.
#include "xla.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "../operations.hpp"

namespace roialign::xla {
namespace {

std::atomic<int> num_threads{1};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A structure whose writer knows all the fields that are read here.
template <class T>
const T& known(const T& structure) {
  require(structure.size >= sizeof(T), "roialign: XLA has an older interface");
  return structure;
}

const Buffer& buffer(const Buffers& buffers, int64_t i, int64_t rank) {
  require(i < buffers.count && buffers.types[i] == kBuffer, "roialign: an array is missing");
  const Buffer& found = known(*static_cast<const Buffer*>(buffers.items[i]));
  require(found.rank == rank, "roialign: an array has another number of dimensions");
  return found;
}

DType dtype_of(const Buffer& buffer) {
  switch (buffer.dtype) {
    case DataType::f16:
      return DType::float16;
    case DataType::bf16:
      return DType::bfloat16;
    case DataType::f32:
      return DType::float32;
    case DataType::f64:
      return DType::float64;
    default:
      throw std::invalid_argument("roialign: arrays must be of a float type");
  }
}

Tensor tensor_of(const Buffer& buffer) {
  return dense(buffer.data, dtype_of(buffer), buffer.dims);
}

// A box gradient, or tangent: (K, 4), of the coordinate type.
void* boxes_like(const Buffer& buffer, const Rois& rois, DType map) {
  require(buffer.dims[0] == rois.count && buffer.dims[1] == 4 &&
              dtype_of(buffer) == coordinate_type(map),
          "roialign: box tangents and gradients must be (K, 4)");
  return buffer.data;
}

double number(const Attributes& attributes, const char* name) {
  for (int64_t i = 0; i < attributes.count; ++i) {
    const Text& text = *attributes.names[i];
    if (text.size != std::strlen(name) || std::memcmp(text.begin, name, text.size) != 0) continue;
    const Scalar& scalar = *static_cast<const Scalar*>(attributes.items[i]);
    require(attributes.types[i] == kScalar && scalar.dtype == DataType::f64, "roialign: no rule");
    double value;
    std::memcpy(&value, scalar.value, sizeof value);
    return value;
  }
  throw std::invalid_argument("roialign: no rule");
}

Params params_of(const Attributes& attributes) {
  const auto get = [&](const char* name) { return number(attributes, name); };
  const double samples = get("sampling_ratio"), min_size = get("min_size");  // min_size < 0: none
  return {{get("scale_y"), get("scale_x")},
          int64_t(samples >= 1 ? std::min(samples, 0x1p62) : -1),
          {get("pixel_offset"), get("input_offset"), get("end_offset"), min_size, min_size >= 0,
           get("adaptive_floor") != 0}};
}

// What all operations take.
struct Call {
  explicit Call(const CallFrame& frame)
      : arguments(known(frame.arguments)),
        results(known(frame.results)),
        params(params_of(known(frame.attributes))) {
    const Buffer &boxes = buffer(arguments, 0, 2), &image_index = buffer(arguments, 1, 1);
    require(boxes.dims[0] >= 0 && boxes.dims[1] == 4 && image_index.dims[0] == boxes.dims[0] &&
                image_index.dtype == DataType::s32,
            "roialign: boxes must be (K, 4) and image_index (K,) of int32");
    const auto* given = static_cast<const int32_t*>(image_index.data);
    index.assign(given, given + image_index.dims[0]);
    rois = {boxes.dims[0], boxes.data, dtype_of(boxes), {4, 1}, index.data(), DType::int64, 1};
  }

  Tensor map(int64_t i) const { return tensor_of(buffer(arguments, i, 4)); }
  Tensor result() const { return tensor_of(buffer(results, 0, 4)); }
  const void* tangent(int64_t i, DType map) const {
    return i < arguments.count ? boxes_like(buffer(arguments, i, 2), rois, map) : nullptr;
  }

  const Buffers &arguments, &results;
  const Params params;
  std::vector<int64_t> index;
  Rois rois;
};

void run_forward(const Call& call, int threads) {
  const Tensor features = call.map(2);
  forward(features, call.rois, call.tangent(3, features.dtype), call.params, call.result(),
          threads);
}

void run_adjoint(const Call& call, int threads) {
  const Tensor d_output = call.map(2);
  adjoint(d_output, call.rois, call.tangent(3, d_output.dtype), call.params, call.result(),
          threads);
}

void run_box_gradient(const Call& call, int threads) {
  const Tensor d_output = call.map(2), features = call.map(3);
  void* d_boxes = boxes_like(buffer(call.results, 0, 2), call.rois, features.dtype);
  box_gradient(d_output, features, call.rois, call.params, d_boxes, threads);
}

Error* error(const CallFrame& frame, ErrorCode code, const char* message) noexcept {
  ErrorArguments arguments{sizeof(ErrorArguments), nullptr, message, code};
  return frame.api->create_error(&arguments);
}

template <void run(const Call&, int)>
Error* handle(CallFrame* frame) noexcept {
  try {
    Extension* extension = frame->extensions;
    if (extension && extension->type == kMetadataExtension) {
      Metadata& metadata = *reinterpret_cast<MetadataExtension*>(extension)->metadata;
      require(metadata.size >= offsetof(Metadata, traits) + sizeof metadata.traits,
              "roialign: XLA has an older interface");
      metadata.api_version = {sizeof(ApiVersion), nullptr, kApiMajor, kApiMinor};
      metadata.traits = 0;
      return nullptr;
    }
    require(frame->stage == kExecute, "roialign: not a call");
    run(Call(known(*frame)), num_threads);
    return nullptr;
  } catch (const std::invalid_argument& e) {
    return error(*frame, ErrorCode::invalid_argument, e.what());
  } catch (const std::bad_alloc&) {
    return error(*frame, ErrorCode::resource_exhausted, "roialign: out of memory");
  } catch (const std::exception& e) {
    return error(*frame, ErrorCode::internal, e.what());
  } catch (...) {
    return error(*frame, ErrorCode::internal, "roialign: failed");
  }
}

}  // namespace

const NamedHandler kHandlers[3] = {
    {"forward", handle<run_forward>},
    {"adjoint", handle<run_adjoint>},
    {"box_gradient", handle<run_box_gradient>},
};

void set_num_threads(int threads) {
  num_threads = std::max(1, threads);
}

}  // namespace roialign::xla

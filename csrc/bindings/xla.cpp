// The operations as custom calls of XLA on the CPU. Arguments: boxes (K, 4), image_index (K,) of
// int32, levels (K,) of int32 where there are several maps, then what the operation takes, its maps
// one after another. Attributes, as float64: `maps`, how many; `scale_y_0`, `scale_x_0`, ... of
// each; and the numbers of the rule by their names.
// Nothing is taken on trust: what does not fit is an error of XLA's, and no exception leaves a
// handler.
#include "xla.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
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
  return contiguous(buffer.data, dtype_of(buffer), buffer.dims);
}

// A box gradient, or tangent: (K, 4), of the coordinate type.
void* boxes_like(const Buffer& buffer, const Rois& rois, DType map) {
  require(buffer.dims[0] == rois.count && buffer.dims[1] == 4 &&
              dtype_of(buffer) == coordinate_type(map),
          "roialign: box tangents and gradients must be (K, 4)");
  return buffer.data;
}

// The attributes, each of which is asked for once.
class Numbers {
 public:
  explicit Numbers(const Attributes& attributes) : attributes_(known(attributes)) {}

  double get(std::string_view name, std::optional<double> otherwise = {}) {
    for (int64_t i = 0; i < attributes_.count; ++i) {
      const Text& text = *attributes_.names[i];
      if (std::string_view(text.begin, text.size) != name) continue;
      const Scalar& scalar = *static_cast<const Scalar*>(attributes_.items[i]);
      require(attributes_.types[i] == kScalar && scalar.dtype == DataType::f64,
              "roialign: a number is not a float64");
      double value;
      std::memcpy(&value, scalar.value, sizeof value);
      ++found_;
      return value;
    }
    require(otherwise.has_value(), "roialign: a number is missing");
    return *otherwise;
  }
  void require_no_other() const {
    require(found_ == attributes_.count, "roialign: exported by a later version");
  }

 private:
  const Attributes& attributes_;
  int64_t found_ = 0;
};

// What all operations take.
class Call {
 public:
  explicit Call(const CallFrame& frame)
      : arguments_(known(frame.arguments)), results_(known(frame.results)) {
    Numbers numbers(frame.attributes);
    const double count = numbers.get("maps");
    require(count >= 1 && count <= double(std::max(arguments_.count, results_.count)),
            "roialign: maps are missing");
    maps_.resize(size_t(count));
    for (size_t i = 0; i < maps_.size(); ++i) {
      maps_[i].scale[0] = numbers.get("scale_y_" + std::to_string(i));
      maps_[i].scale[1] = numbers.get("scale_x_" + std::to_string(i));
    }
    const double values[] = {
#define ROIALIGN_NUMBER(name, otherwise) numbers.get(#name, otherwise),
        ROIALIGN_RULE(ROIALIGN_NUMBER)
#undef ROIALIGN_NUMBER
    };
    rule = rule_of(values, kRuleNumbers);
    numbers.require_no_other();

    const Buffer& boxes = buffer(arguments_, next_++, 2);
    require(boxes.dims[0] >= 0 && boxes.dims[1] == 4, "roialign: boxes must be (K, 4)");
    rois = {boxes.dims[0], boxes.data, dtype_of(boxes), {4, 1}, {}, {}};
    rois.image_index = column();
    if (maps_.size() > 1) rois.level = column();
  }

  // The arguments after those, in their order.
  Tensor array() { return tensor_of(buffer(arguments_, next_++, 4)); }
  Maps maps() {
    for (Map& map : maps_) map.array = array();
    return all();
  }
  const void* tangent(DType map) {
    return next_ < arguments_.count ? boxes_like(buffer(arguments_, next_++, 2), rois, map)
                                    : nullptr;
  }

  Tensor result() const { return tensor_of(buffer(results_, 0, 4)); }
  Maps result_maps() {
    for (size_t i = 0; i < maps_.size(); ++i) {
      maps_[i].array = tensor_of(buffer(results_, int64_t(i), 4));
    }
    return all();
  }
  void* d_boxes(DType map) const { return boxes_like(buffer(results_, 0, 2), rois, map); }

  Rule rule;
  Rois rois;

 private:
  Column column() {
    const Buffer& given = buffer(arguments_, next_++, 1);
    require(given.dims[0] == rois.count && given.dtype == DataType::s32,
            "roialign: image_index and levels must be (K,) of int32");
    return {given.data, DType::int32, 1};
  }
  Maps all() const { return {maps_.data(), int64_t(maps_.size())}; }

  const Buffers &arguments_, &results_;
  int64_t next_ = 0;  // argument
  std::vector<Map> maps_;
};

void run_forward(const CallFrame& frame) {
  Call call(frame);
  const Maps maps = call.maps();
  const void* tangent = call.tangent(maps.first().dtype);
  forward(maps, call.rois, tangent, call.rule, call.result(), num_threads);
}

void run_adjoint(const CallFrame& frame) {
  Call call(frame);
  const Tensor d_output = call.array();
  const void* tangent = call.tangent(d_output.dtype);
  adjoint(d_output, call.rois, tangent, call.rule, call.result_maps(), num_threads);
}

void run_box_gradient(const CallFrame& frame) {
  Call call(frame);
  const Tensor d_output = call.array();
  const Maps maps = call.maps();
  void* d_boxes = call.d_boxes(d_output.dtype);
  box_gradient(d_output, maps, call.rois, call.rule, d_boxes, num_threads);
}

void refuse(const CallFrame&) {
  throw std::invalid_argument("roialign: exported by roialign 0.1: export it again");
}

Error* error(const CallFrame& frame, ErrorCode code, const char* message) noexcept {
  ErrorArguments arguments{sizeof(ErrorArguments), nullptr, message, code};
  return frame.api->create_error(&arguments);
}

template <void run(const CallFrame&)>
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
    run(known(*frame));
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

const NamedHandler kHandlers[6] = {
    {"forward_maps", handle<run_forward>},
    {"adjoint_maps", handle<run_adjoint>},
    {"box_gradient_maps", handle<run_box_gradient>},
    {"forward", handle<refuse>},
    {"adjoint", handle<refuse>},
    {"box_gradient", handle<refuse>},
};

void set_num_threads(int threads) {
  num_threads = std::max(1, threads);
}

}  // namespace roialign::xla

// The operations as custom calls of XLA on the CPU. Arguments and results: the arrays of a Call
// (calls.hpp). Attributes, as float64: `maps`, how many; `scale_y_0`, `scale_x_0`, ... of each; the
// numbers of the rule by their names; and `channels_last`, which may be missing.
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

#include "calls.hpp"

namespace roialign::xla {
namespace {

std::atomic<int> num_threads{1};

// A structure whose writer knows all the fields that are read here.
template <class T>
const T& known(const T& structure) {
  require(structure.size >= sizeof(T), "roialign: XLA has an older interface");
  return structure;
}

DType dtype_of(DataType type) {
  switch (type) {
    case DataType::pred:
    case DataType::u8:
      return DType::uint8;
    case DataType::s32:
      return DType::int32;
    case DataType::f16:
      return DType::float16;
    case DataType::bf16:
      return DType::bfloat16;
    case DataType::f32:
      return DType::float32;
    case DataType::f64:
      return DType::float64;
    default:
      throw std::invalid_argument("roialign: no array of this dtype is taken");
  }
}

void add_arrays(const Buffers& buffers, Call& call) {
  for (int64_t i = 0; i < known(buffers).count; ++i) {
    require(buffers.types[i] == kBuffer, "roialign: an array is missing");
    const Buffer& buffer = known(*static_cast<const Buffer*>(buffers.items[i]));
    call.arrays.push_back({buffer.data, dtype_of(buffer.dtype), buffer.rank, buffer.dims});
  }
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

template <void operation(Call&)>
void run(const CallFrame& frame) {
  Call call;
  call.threads = num_threads;
  call.arrays.reserve(8);  // most calls have fewer
  add_arrays(frame.arguments, call);
  add_arrays(frame.results, call);
  Numbers numbers(frame.attributes);
  const double count = numbers.get("maps");
  require(count >= 1 && count <= double(call.arrays.size()), "roialign: maps are missing");
  call.maps.resize(size_t(count));
  for (size_t i = 0; i < call.maps.size(); ++i) {
    call.maps[i].scale[0] = numbers.get("scale_y_" + std::to_string(i));
    call.maps[i].scale[1] = numbers.get("scale_x_" + std::to_string(i));
  }
  const double values[] = {
#define ROIALIGN_NUMBER(name, otherwise) numbers.get(#name, otherwise),
      ROIALIGN_RULE(ROIALIGN_NUMBER)
#undef ROIALIGN_NUMBER
  };
  call.rule = rule_of(values, kRuleNumbers);
  call.channels_last = numbers.get("channels_last", 0) != 0;
  numbers.require_no_other();
  operation(call);
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
    {"forward_maps", handle<run<run_forward>>},
    {"adjoint_maps", handle<run<run_adjoint>>},
    {"box_gradient_maps", handle<run<run_box_gradient>>},
    {"forward", handle<refuse>},
    {"adjoint", handle<refuse>},
    {"box_gradient", handle<refuse>},
};

void set_num_threads(int threads) {
  num_threads = std::max(1, threads);
}

}  // namespace roialign::xla

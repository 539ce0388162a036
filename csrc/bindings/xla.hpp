// The part of XLA's C interface for custom calls that the handlers use, declared here so that the
// build needs no header of XLA: API 0.1, which jaxlib has had from 0.4.38 on. Newer versions only
// append fields. tests/test_jax_ffi.py compares the layouts with jaxlib's own headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace roialign::xla {

constexpr int kApiMajor = 0, kApiMinor = 1;

// Every structure starts with the size that its writer knows, and a list of extensions.
struct Extension {
  size_t size;
  int32_t type;
  Extension* next;
};
constexpr int32_t kMetadataExtension = 1;

struct ApiVersion {
  size_t size;
  Extension* extensions;
  int major, minor;
};

// Asked for at registration, instead of a call: which interface the handler was built for.
struct Metadata {
  size_t size;
  ApiVersion api_version;
  uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum class DataType : int32_t {
  pred = 1,
  s32 = 4,
  u8 = 6,
  f16 = 10,
  f32 = 11,
  f64 = 12,
  bf16 = 16
};

// Dense, in row-major order.
struct Buffer {
  size_t size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};
constexpr int32_t kBuffer = 1;  // the type of an argument, or of a result

struct Buffers {  // the arguments, or the results
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* types;
  void** items;
};

struct Text {
  const char* begin;
  size_t size;
};
struct Scalar {
  DataType dtype;
  void* value;
};
constexpr int32_t kScalar = 3;  // the type of an attribute

struct Attributes {
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* types;
  Text** names;
  void** items;
};

struct Error;  // XLA's own
enum class ErrorCode : int32_t { invalid_argument = 3, resource_exhausted = 8, internal = 13 };
struct ErrorArguments {
  size_t size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct Api {  // its first fields
  size_t size;
  Extension* extensions;
  ApiVersion api_version;
  const void* internal;
  Error* (*create_error)(ErrorArguments*);
};

constexpr int32_t kExecute = 3;  // the stage of a call

struct CallFrame {  // its first fields
  size_t size;
  Extension* extensions;
  const Api* api;
  void* context;
  int32_t stage;
  Buffers arguments, results;
  Attributes attributes;
};

using Handler = Error*(CallFrame*);

struct NamedHandler {
  const char* name;
  Handler* handler;
};
extern const NamedHandler kHandlers[6];

// How many threads the handlers use: they run where no Python is.
void set_num_threads(int threads);

}  // namespace roialign::xla

#include "calls.hpp"

#include <algorithm>

namespace roialign {
namespace {

// Takes the arrays, one after another.
class Reader {
 public:
  explicit Reader(Call& call) : call_(call) {
    const Array& boxes = next(2);
    const int64_t count = boxes.shape[0], numbers = boxes.shape[1];
    require(count >= 0 && (numbers == 4 || numbers == kTurnedNumbers),
            "roialign: boxes must be (K, 4) or (K, 5)");
    rois = {count, boxes.data, boxes.dtype, {numbers, 1}, {}, {}, numbers};
    rois.image_index = column();
    if (call.maps.size() > 1 || (left() && front().ndim == 1)) rois.level = column();
    if (call.rule.reduction != 0) {
      selectors_ = call.maps;
      for (Map& map : selectors_) map.array = tensor();
    }
  }

  Rois rois;

  Maps selectors() const { return {selectors_.data(), int64_t(selectors_.size())}; }

  Tensor tensor() {
    const Array& array = next(4);
    Tensor tensor = contiguous(array.data, array.dtype, array.shape);
    if (call_.channels_last) {
      std::rotate(tensor.shape + 1, tensor.shape + 3, tensor.shape + 4);
      std::rotate(tensor.stride + 1, tensor.stride + 3, tensor.stride + 4);
    }
    return tensor;
  }
  Maps maps() {
    for (Map& map : call_.maps) map.array = tensor();
    return {call_.maps.data(), int64_t(call_.maps.size())};
  }
  // A box gradient, or tangent.
  void* boxes_like(DType map) {
    const Array& array = next(2);
    require(array.shape[0] == rois.count && array.shape[1] == rois.numbers &&
                array.dtype == coordinate_type(map),
            "roialign: box tangents and gradients must be like the boxes, of the coordinate type");
    return array.data;
  }
  const void* tangent(DType map) {
    if (left() && front().ndim == 4) return nullptr;
    if (left() && front().ndim == 1 && front().shape[0] == 1) {  // in graphs of MindSpore, by 0.2
      ++at_;
      return nullptr;
    }
    return boxes_like(map);
  }
  void finish() const { require(!left(), "roialign: there are more arrays"); }

 private:
  bool left() const { return at_ < call_.arrays.size(); }
  const Array& front() const { return call_.arrays[at_]; }
  const Array& next(int64_t ndim) {
    require(left(), "roialign: an array is missing");
    require(front().ndim == ndim, "roialign: an array has another number of dimensions");
    return call_.arrays[at_++];
  }
  Column column() {
    const Array& index = next(1);
    require(index.shape[0] == rois.count, "roialign: image_index and levels must be (K,)");
    return {index.data, index.dtype, 1};
  }

  Call& call_;
  std::vector<Map> selectors_;
  size_t at_ = 0;
};

}  // namespace

void run_forward(Call& call) {
  Reader read(call);
  const Maps maps = read.maps();
  const void* tangent = read.tangent(maps.first().dtype);
  const Tensor output = read.tensor();
  read.finish();
  forward(maps, read.rois, tangent, call.rule, output, call.threads, read.selectors());
}

void run_adjoint(Call& call) {
  Reader read(call);
  const Tensor d_output = read.tensor();
  const void* tangent = read.tangent(d_output.dtype);
  const Maps maps = read.maps();
  read.finish();
  adjoint(d_output, read.rois, tangent, call.rule, maps, call.threads, read.selectors());
}

void run_box_gradient(Call& call) {
  Reader read(call);
  const Tensor d_output = read.tensor();
  const Maps maps = read.maps();
  void* d_boxes = read.boxes_like(d_output.dtype);
  read.finish();
  box_gradient(d_output, maps, read.rois, call.rule, d_boxes, call.threads, read.selectors());
}

}  // namespace roialign

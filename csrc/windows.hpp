// All taps of one call, built once before the engine runs: one window per RoI, in the order in
// which the engine visits them, and the pixels that each band of windows is the first or the last
// to touch.
#pragma once

#include <cstdint>

#include "params.hpp"

namespace roialign {

// A pixel of a block of channels, in the engine's scratch: a cache line.
constexpr int kLineBytes = 64;

// Pixels travel between a map and the engine's scratch in groups of this many: a cache line of
// float32, and a square transposition.
constexpr int64_t kGroup = 16;

// By rows a run of columns is read whole if it is at most so many times those with weight: a
// vector of 16 costs about as much as two columns one by one.
constexpr int64_t kSparse = 8;

// With channels innermost an image of which fewer than one of so many pixels is touched is cleared
// as a whole.
constexpr int64_t kSparsePixels = 4;

// By rows channels that follow each other in memory, up to so many, are read together: colours.
constexpr int64_t kInterleaved = 4;

// The most taps of a bin in an axis that is called separate: 2 samples that share no pixel.
constexpr int kSeparateTaps = 4;

// One axis of one window: a sparse matrix over the window's own pixels, every row padded to `taps`
// entries by repeating its last one with weight 0. Entry t of row i is at [i * taps + t]. An
// entry's `index` counts along `pixels` where rows are bins, and along the bins where the matrix is
// transposed and its rows are `pixels`; those with a single entry come first.
//
// For the way by bins an axis is flat: its rows are bins, an entry's `index` is the pixel itself,
// and neither the distinct pixels nor the padding are there.
template <class Real>
struct Axis {
  const int32_t* pixels;  // the distinct rows (columns) of the map that have weight
  int32_t pixel_count;
  int32_t taps;
  int32_t singles;         // rows with one entry at the start of a transposed matrix
  bool separate;           // bins have few taps and share few pixels
  const int32_t* entries;  // of a row, without the padding
  const int32_t* index;
  const Real* weight[2];  // values: [0]; slopes: in the box's start, in its end
};

// One product y . F . x^T of sparse matrices. The plain operations have one term; with a box
// tangent there are two, and the box gradient's two give the boxes' y and x.
template <class Real>
struct Term {
  Axis<Real> y, x;
  int32_t* rows;          // where the map is packed: the line of column 0 of each of y's pixels
  int32_t least, extent;  // the columns are in [least, least + extent)
};

// The samples of one axis of one window of which each bin takes the largest: those of bin k are
// [first[k], first[k + 1]).
template <class Real>
struct Samples {
  struct At {
    int32_t low, high;  // in y, counted along the axis's pixels; in x, along the map
    Real weight[2];     // of these; 0: not read
  };
  const int32_t* first;
  At* at;
  const Real* moves[2];        // with the box's start and end; with a tangent, [0]: along it
  const bool *before, *after;  // of a bin: samples that are not inside come before these, or after
  const bool* plain;           // of a bin: all samples are inside, and whole
};

// Whether a sample with such weights in both axes reads all four pixels: no product of what is
// larger than this is 0.
template <class Real>
inline bool is_whole(const Real weight[2]) {
  return weight[1] > Real(0x1p-60);
}

// The bins of one window that is turned: those of bin k are the pixels [first[k], first[k + 1]),
// whose y counts along the window's rows.
template <class Real>
struct Patches {
  const int64_t* first;
  const Pixel* pixel;
  const Real *weight, *slopes;
};

// What they are made of, where they are not kept.
template <class Real>
struct Turn {
  Real box[kTurnedNumbers], along[kTurnedNumbers], scale;  // `along`: a tangent
  bool sloped, tangent;
  const Rule* rule;
  int64_t bins[2], size[2];
  int64_t count;       // pixels of all bins
  int32_t top;         // the first row
  Patches<Real> kept;  // or null
};

template <class Real>
struct Window {
  int64_t roi;
  const Term<Real>* term;  // next to what its axes point to: a window is read as one run of memory
  int term_count;          // 0: on no map, or no image
  bool alike;              // of the box gradient's terms: they number the same pixels
  const Samples<Real>* samples;  // y and x, where bins are largest samples, else null
  const Turn<Real>* turn;        // where the box is turned, else null
};

enum class Operation { forward, adjoint, box_gradient };

// How an image is pooled: from packed lines; or where the map is, by rows of bins, bin by bin, or
// sample by sample.
enum class Way { any, packed, rows, bins, samples };

// Groups of pixels that follow each other: [index, index + count) of a map, of which pixel i is in
// group i / kGroup, and from `place` on among the packed ones.
struct Run {
  int64_t index, place, count;
};

// Runs in the order of their addresses: memory is read and written in streams.
struct Groups {
  const Run* runs;
  int64_t count;
};

// Windows whose centres are in one band of rows, from left to right or back.
template <class Real>
struct Band {
  const Window<Real>* windows;
  int64_t count;
  Groups first;  // touched by no earlier band
  Groups last;   // adjoint only: touched by no later band
};

// What one engine task visits, for its channels: bands of one image from top to bottom.
template <class Real>
struct Visit {
  int64_t image;
  Way way;         // a map that is not packed has one band, and no groups are listed
  int64_t groups;  // that are touched
  const Band<Real>* bands;
  int64_t count;
  Groups untouched;  // adjoint only: touched by no band
};

template <class Real>
struct Windows {
  const Visit<Real>* visits;  // map after map
  const int64_t* ends;        // of the visits of each map
  int64_t max_columns;        // the most pixel columns of a term
  int64_t work;               // multiply-adds per channel
};

// The bins of a window that is turned, until the thread's next call.
template <class Real>
Patches<Real> patches_of(const Window<Real>& window);

// For tests: all images that can be are pooled this way; any: the way that costs least.
void force_way(Way forced);
Way way_forced();

// Whether a map is pooled bin by bin: a matter of the call's shapes and the map's strides alone.
// The forward has the same bits in each way.
bool by_bins(Operation operation, const Tensor& map, int64_t rois, const int64_t bins[2]);

// How many tasks share a visit of a map: one for each slice of its channels.
struct Slicing {
  int64_t (*count)(const void* context, int64_t map);
  const void* context;
};

// Builds into storage of the calling thread, valid until its next call. `tangent` is a direction
// (K, 4) in the boxes, or null. Work is cut into visits without regard to the number of threads. A
// RoI on no map or no image has a window without terms, in a visit of the first image.
template <class Real>
Windows<Real> build_windows(Operation operation, Maps maps, const Rois& rois, const Real* tangent,
                            const Rule& rule, const int64_t bins[2], Slicing slicing, int threads);

}  // namespace roialign

// The CPU implementations of the convolution ops: checks, packs weights, fills a `Conv`, hands its
// tasks to the threads.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "glue.h"

namespace snoopi {
namespace {

ConvKind kind_of(const std::string& name) {
  if (name == "direct") return ConvKind::kDirect;
  if (name == "winograd") return ConvKind::kWinograd;
  if (name == "phased") return ConvKind::kPhased;
  TORCH_CHECK(name == "doubled",
              "snoopi: a convolution must be direct, winograd, doubled or phased, got ", name);
  return ConvKind::kDoubled;
}

std::string name_of(ConvKind kind) {
  switch (kind) {
    case ConvKind::kDirect:
      return "direct";
    case ConvKind::kWinograd:
      return "winograd";
    case ConvKind::kDoubled:
      return "doubled";
    default:
      return "phased";
  }
}

// Bytes of a packed convolution; 0: this processor's kernel has none.
int64_t conv_size(ConvKind kind, int64_t c_out, int64_t c_in, at::ScalarType type) {
  const Kernel& kernel = kernel_for(type);
  if (!kernel.convolves(kind) || c_in % kConvChannels != 0) return 0;
  return positions_of(kind) * kernel.linear_bytes(c_out, depth_of(kind, c_in));
}

// G g G^T of Winograd's transformation of a 3x3 filter; rows and columns `used` of four.
template <typename Real, typename T>
void transform_filter(const T* g, const int* used, int count, Real* u) {
  static constexpr Real kG[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  for (int i = 0; i < count; ++i) {
    Real row[3] = {};
    for (int j = 0; j < 9; ++j) row[j % 3] += kG[used[i]][j / 3] * static_cast<Real>(g[j]);
    for (int j = 0; j < count; ++j) {
      const Real* by = kG[used[j]];
      u[i * count + j] = row[0] * by[0] + row[1] * by[1] + row[2] * by[2];
    }
  }
}

// A 3x3 filter of a doubled picture as 2x2 filters of the plain one, [phase tap]: of the pixels 2y
// and 2y + 1, rows {y - 1, y, y} and {y, y, y + 1} meet the filter's.
template <typename Real, typename T>
void sum_phases(const T* g, Real* u) {
  static constexpr int kFrom[2][3] = {{0, 1, 1}, {0, 0, 1}};
  for (int i = 0; i < 16; ++i) u[i] = 0;
  for (int phase = 0; phase < 4; ++phase) {
    for (int k = 0; k < 9; ++k) {
      const int tap = 2 * kFrom[phase / 2][k / 3] + kFrom[phase % 2][k % 3];
      u[4 * phase + tap] += static_cast<Real>(g[k]);
    }
  }
}

// The matrices of a convolution's products, [positions c_out depth] in the weight's type.
template <typename T, typename Real>
Tensor matrices(const Tensor& weight, ConvKind kind) {
  static constexpr int kAll[] = {0, 1, 2, 3}, kThree[] = {0, 1, 3};
  const int64_t c_out = weight.size(0), c_in = weight.size(1), filter = weight.size(2);
  const int64_t positions = positions_of(kind), taps = taps_of(kind);
  // Chunks of channels are for products with taps; without, the depth is all channels.
  const int64_t chunk = chunk_of(c_in), matrix = c_out * taps * c_in;
  const Tensor out = at::empty({positions, c_out, taps * c_in}, weight.options());
  const T* from = weight.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  parallel(c_out, c_in * 64, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t first = 0; first < c_in; first += chunk) {
        T* row = to + (o * c_in + first) * taps;
        for (int64_t i = 0; i < chunk; ++i) {
          const T* g = from + (o * c_in + first + i) * filter * filter;
          Real u[16];
          switch (kind) {
            case ConvKind::kWinograd:
              transform_filter(g, kAll, 4, u);
              break;
            case ConvKind::kDoubled:
              transform_filter(g, kThree, 3, u);
              break;
            case ConvKind::kPhased:
              sum_phases(g, u);
              break;
            default:
              for (int64_t k = 0; k < taps; ++k) row[k * chunk + i] = g[k];
              continue;
          }
          for (int64_t p = 0; p < positions; ++p) {
            for (int64_t k = 0; k < taps; ++k) {
              row[p * matrix + k * chunk + i] = static_cast<T>(u[p * taps + k]);
            }
          }
        }
      }
    }
  });
  return out;
}

// [positions c_out depth], by panels of columns.
Tensor pack_matrices(const Tensor& parts, at::ScalarType type) {
  const Kernel& kernel = kernel_for(type);
  const int64_t c_out = parts.size(1), depth = parts.size(2), columns = kernel.conv_columns();
  const int64_t size = kernel.linear_bytes(c_out, depth),
                panel = kernel.linear_bytes(columns, depth);
  const Tensor packed = bytes({parts.size(0) * size});
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  const char* from = static_cast<const char*>(parts.const_data_ptr());
  const int64_t panels = at::divup(c_out, columns);
  const int64_t row = depth * static_cast<int64_t>(parts.element_size());
  parallel(parts.size(0) * panels, columns * depth * 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / panels, j = i % panels * columns;
      const int64_t count = std::min(columns, c_out - j);
      kernel.pack_linear(from + (p * c_out + j) * row, depth, count, depth, 0, count,
                         to + p * size + i % panels * panel);
    }
  });
  return packed;
}

Tensor pack_conv(const Tensor& weight, std::string name) {
  const ConvKind kind = kind_of(name);
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
              "snoopi: the weight of a convolution must be [c_out c_in 3 3], got ", weight.sizes());
  TORCH_CHECK(weight.size(1) % kConvChannels == 0, "snoopi: c_in must be a multiple of ",
              kConvChannels, ", got ", weight.size(1));
  const at::ScalarType type = computing_type(weight.scalar_type());
  TORCH_CHECK(conv_size(kind, weight.size(0), weight.size(1), type) > 0,
              "snoopi: this processor's kernel packs no ", name, " convolution");
  const Tensor plain = weight.to(type).contiguous();
  const Tensor parts = type == at::kDouble     ? matrices<double, double>(plain, kind)
                       : type == at::kBFloat16 ? matrices<at::BFloat16, float>(plain, kind)
                                               : matrices<float, float>(plain, kind);
  return pack_matrices(parts, type);
}

// Where channels lie next to each other, pixel after pixel.
Tensor channels_last(const Tensor& x, at::ScalarType type) {
  return x.to(type).contiguous(at::MemoryFormat::ChannelsLast);
}

// How many tiles a task is high and wide: as few products as can be, then as little border.
std::pair<int64_t, int64_t> block_of(const Conv& call, const Kernel& kernel, int64_t height,
                                     int64_t width) {
  const int64_t rows = kernel.block_rows;
  // No more than what gives every thread a task; of few pixels each has its output columns, so that
  // the weights pass from memory once.
  const int64_t all = call.b * height * width;
  const bool few = call.b == 1 && all <= kernel.conv_tiles(call);
  const int64_t share = few ? all : at::divup(all, at::get_num_threads());
  const int64_t most =
      std::max(rows, std::min(kernel.conv_tiles(call), at::divup(share, rows) * rows));
  const int64_t step = call.kind == ConvKind::kWinograd ? 2 : 1;
  std::pair<int64_t, int64_t> best = {1, 1};
  int64_t least = -1;
  for (int64_t w = 1; w <= std::min(width, most); ++w) {
    const int64_t h = std::min(height, most / w);
    const int64_t blocks = at::divup(height, h) * at::divup(width, w);
    const int64_t cost = blocks * (4 * step * step * at::divup(h * w, rows) * rows +
                                   (step * h + 2) * (step * w + 2));
    if (least < 0 || cost < least) best = {h, w}, least = cost;
  }
  return best;
}

void run(const Conv& call, const Kernel& kernel) {
  const int64_t step = call.kind == ConvKind::kWinograd ? 2 : 1;
  const int64_t height = at::divup(call.h, step), width = at::divup(call.w, step);
  const auto [block_h, block_w] = block_of(call, kernel, height, width);
  const int64_t across = at::divup(width, block_w), down = at::divup(height, block_h);
  const int64_t blocks = call.b * down * across, threads = at::get_num_threads();
  // Few blocks are shared out by output columns as well, each thread making the same rows.
  const int64_t of_panel = kernel.conv_columns();
  const int64_t panels = at::divup(call.c_out, of_panel);
  const bool uneven = blocks < 4 * threads && blocks % threads != 0;
  const int64_t parts = uneven ? std::min(threads, panels) : 1;
  const int64_t columns = at::divup(panels, parts) * of_panel;
  const int64_t work =
      block_h * block_w * positions_of(call.kind) * columns * depth_of(call.kind, call.c_in);
  parallel(blocks * parts, work, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_of(kernel.conv_bytes(call, block_h, block_w));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / parts, j = i % parts * columns;
      const int64_t y = block / across % down * block_h, x = block % across * block_w;
      if (j >= call.c_out) continue;
      const ConvTask task = {block / (down * across),      y, std::min(y + block_h, height),    x,
                             std::min(x + block_w, width), j, std::min(j + columns, call.c_out)};
      kernel.run_conv(call, task, scratch.get());
    }
  });
}

Tensor conv(const Tensor& x, const Tensor& weight, std::string name, int64_t c_out,
            const OptionalTensor& scale, const OptionalTensor& shift, bool silu,
            const OptionalTensor& added, const OptionalTensor& residual) {
  const ConvKind kind = kind_of(name);
  TORCH_CHECK(x.dim() == 4, "snoopi: x must be [b c h w], got ", x.sizes());
  const at::ScalarType type = computing_type(x.scalar_type()), sums = accumulator(type);
  const Tensor input = channels_last(x, type);
  const int64_t b = x.size(0), c_in = x.size(1), times = doubles(kind) ? 2 : 1;
  const int64_t h = x.size(2) * times, w = x.size(3) * times;
  const int64_t size = conv_size(kind, c_out, c_in, type);
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == size && size > 0 &&
                  weight.scalar_type() == at::kByte && weight.is_contiguous(),
              "snoopi: a packed ", name, " weight of ", c_in, " to ", c_out, " channels must be [",
              size, "] bytes, got ", weight.sizes(), "; pack_conv makes it, for this processor");
  Conv call = {};
  call.kind = kind, call.b = b, call.h = x.size(2), call.w = x.size(3);
  call.c_in = c_in, call.c_out = c_out, call.silu = silu;
  call.x = input.const_data_ptr();
  call.weight = weight.const_data_ptr();
  Tensor scales, shifts, sum, rest;
  TORCH_CHECK(scale.has_value() == shift.has_value(), "snoopi: scale and shift come together");
  if (scale.has_value()) {
    for (const Tensor& part : {*scale, *shift}) {
      TORCH_CHECK(part.dim() == 2 && part.size(0) == b && part.size(1) == c_in,
                  "snoopi: scale and shift must be [", b, " ", c_in, "], got ", part.sizes());
    }
    scales = scale->to(sums).contiguous(), shifts = shift->to(sums).contiguous();
    call.scale = scales.const_data_ptr(), call.shift = shifts.const_data_ptr();
    call.norm_stride = c_in;
  }
  if (added.has_value()) {
    TORCH_CHECK(added->dim() == 2 && (added->size(0) == b || added->size(0) == 1) &&
                    added->size(1) == c_out,
                "snoopi: added must be [", b, "|1 ", c_out, "], got ", added->sizes());
    sum = added->to(sums).contiguous();
    call.added = sum.const_data_ptr();
    call.added_stride = sum.size(0) == 1 ? 0 : c_out;
  }
  const Tensor out =
      at::empty({b, c_out, h, w}, x.options().dtype(type), at::MemoryFormat::ChannelsLast);
  if (residual.has_value()) {
    TORCH_CHECK(residual->sizes() == out.sizes(), "snoopi: residual must be ", out.sizes(),
                ", got ", residual->sizes());
    rest = channels_last(*residual, type);
    call.residual = rest.const_data_ptr();
  }
  call.out = out.mutable_data_ptr();
  if (out.numel() > 0) run(call, kernel_for(type));
  return out.scalar_type() == x.scalar_type() ? out : out.to(x.scalar_type());
}

// weight (x - mean) / sqrt(variance + eps) + bias of every group, as scale x + shift.
std::tuple<Tensor, Tensor> group_norm_fold(const Tensor& x, int64_t groups,
                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                           double eps) {
  TORCH_CHECK(x.dim() == 4 && groups > 0 && x.size(1) % groups == 0 && x.numel() > 0,
              "snoopi: x must be [b c h w] with c a multiple of ", groups, " groups, got ",
              x.sizes());
  TORCH_CHECK(x.size(1) % kConvChannels == 0, "snoopi: c must be a multiple of ", kConvChannels,
              ", got ", x.size(1));
  const at::ScalarType type = computing_type(x.scalar_type()), sums = accumulator(type);
  const Tensor input = channels_last(x, type);
  const int64_t b = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
  // Sums of many pixels in fp32 would round; and one run is a thread's task.
  constexpr int64_t kRun = 256;
  const int64_t runs = at::divup(pixels, kRun);
  const auto options = at::TensorOptions(at::kDouble);
  const Tensor parts = at::empty({b * runs, 2, c}, at::TensorOptions(sums));
  // A channel's own first value is near its mean: what is summed and squared is its spread.
  const Tensor about = input.permute({0, 2, 3, 1}).select(1, 0).select(1, 0).to(sums).contiguous();
  const size_t wide = about.element_size();
  const char* from = static_cast<const char*>(input.const_data_ptr());
  const char* centre = static_cast<const char*>(about.const_data_ptr());
  char* to = static_cast<char*>(parts.mutable_data_ptr());
  const Kernel& kernel = kernel_for(type);
  parallel(b * runs, kRun * c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / runs, first = i % runs * kRun;
      const size_t row = static_cast<size_t>(c) * wide;
      char* sum = to + static_cast<size_t>(2 * i) * row;
      const Moments call = {from + item * pixels * c * static_cast<int64_t>(input.element_size()),
                            c, centre + static_cast<size_t>(item) * row, sum, sum + row};
      kernel.add_moments(call, first, std::min(first + kRun, pixels));
    }
  });
  const Tensor totals = parts.view({b, runs, 2, c}).sum(1, false, at::kDouble).contiguous();
  const Tensor centres = about.to(at::kDouble);
  const Tensor scale = at::empty({b, c}, options), shift = at::empty({b, c}, options);
  const Tensor gain = weight.has_value() ? weight->to(at::kDouble).contiguous() : Tensor();
  const Tensor offset = bias.has_value() ? bias->to(at::kDouble).contiguous() : Tensor();
  const int64_t width = c / groups;
  const double n = static_cast<double>(pixels), of_group = n * static_cast<double>(width);
  for (int64_t item = 0; item < b; ++item) {
    const double* sum = totals.const_data_ptr<double>() + item * 2 * c;
    const double* squares = sum + c;
    const double* k = centres.const_data_ptr<double>() + item * c;
    for (int64_t g = 0; g < c; g += width) {
      double mean = 0, spread = 0;
      for (int64_t i = g; i < g + width; ++i) mean += (n * k[i] + sum[i]) / of_group;
      for (int64_t i = g; i < g + width; ++i) {
        const double away = k[i] - mean;  // sum over pixels of (x - mean)^2
        spread += squares[i] + 2 * away * sum[i] + n * away * away;
      }
      const double by = 1 / std::sqrt(spread / of_group + eps);
      for (int64_t i = g; i < g + width; ++i) {
        const double s = by * (gain.defined() ? gain.const_data_ptr<double>()[i] : 1);
        scale.mutable_data_ptr<double>()[item * c + i] = s;
        shift.mutable_data_ptr<double>()[item * c + i] =
            (offset.defined() ? offset.const_data_ptr<double>()[i] : 0) - s * mean;
      }
    }
  }
  return {scale.to(sums), shift.to(sums)};
}

}  // namespace
}  // namespace snoopi

TORCH_LIBRARY_IMPL(snoopi, CPU, m) {
  m.impl("conv", &snoopi::conv);
  m.impl("pack_conv", &snoopi::pack_conv);
  m.impl("group_norm_fold", &snoopi::group_norm_fold);
}

TORCH_LIBRARY_FRAGMENT(snoopi, m) {
  // The fastest kind of a 3x3 convolution, of a doubled picture if `doubled`.
  m.def("conv_kind(bool doubled, int c_out, int c_in, ScalarType dtype) -> str",
        [](bool doubled, int64_t c_out, int64_t c_in, at::ScalarType dtype) {
          const snoopi::Kernel& kernel = snoopi::kernel_for(snoopi::computing_type(dtype));
          return snoopi::name_of(kernel.conv_kind(doubled, c_out, c_in));
        });
  // Bytes of a packed convolution (0: not to be packed).
  m.def("conv_bytes(str kind, int c_out, int c_in, ScalarType dtype) -> int",
        [](std::string kind, int64_t c_out, int64_t c_in, at::ScalarType dtype) {
          return snoopi::conv_size(snoopi::kind_of(kind), c_out, c_in,
                                   snoopi::computing_type(dtype));
        });
}

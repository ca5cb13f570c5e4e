// The CPU implementations of the ops on linear layers: checks, packs weights, fills a `Linear`,
// hands its tasks to the threads.
#include <torch/library.h>

#include "glue.h"

namespace snoopi {

Tensor pack_weight(const Tensor& w, at::ScalarType type) {
  TORCH_CHECK(w.dim() == 2, "snoopi: a weight must be [c_out c_in], got ", w.sizes());
  const Kernel& kernel = kernel_for(type);
  const Tensor weight = readable(w, type);
  const int64_t c_out = w.size(0), c_in = w.size(1), columns = kernel.linear_columns;
  const Tensor packed = bytes({kernel.linear_bytes(c_out, c_in)});
  TORCH_CHECK(packed.numel() > 0, "snoopi: this processor's kernel packs no weights");
  void* to = packed.mutable_data_ptr();
  parallel(at::divup(c_out, columns), columns * c_in * 4, [&](int64_t begin, int64_t end) {
    kernel.pack_linear(weight.const_data_ptr(), weight.stride(0), c_out, c_in, begin * columns,
                       std::min(end * columns, c_out), to);
  });
  return packed;
}

namespace {

// Columns in the order in which a gate's kernel wants them: of `vector` values and `vector` gates.
Tensor paired(const Tensor& rows, int64_t vector) {
  const int64_t blocks = rows.size(0) / (2 * vector);
  const Tensor parted = rows.contiguous().view({2, blocks, vector, -1});
  return parted.transpose(0, 1).contiguous().view({rows.size(0), -1});
}

Tensor pack_linear(const Tensor& weight) {
  return pack_weight(weight, computing_type(weight.scalar_type()));
}

// The weight [2c c_in] of a layer whose outputs are c values, then c gates.
Tensor pack_geglu(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, "snoopi: a weight must be [2c c_in], got ", weight.sizes());
  const at::ScalarType type = computing_type(weight.scalar_type());
  const int64_t vector = kernel_for(type).vector;
  TORCH_CHECK(weight.size(0) % (2 * vector) == 0, "snoopi: a gated weight must have a multiple of ",
              2 * vector, " outputs, got ", weight.sizes());
  return pack_weight(paired(weight.to(type), vector), type);
}

void run(const Linear& call, const Kernel& kernel) {
  const int64_t threads = at::get_num_threads(), most = kernel.linear_rows(call.c_in);
  // Few rows are shared out by output columns, each thread making the same rows, so that the
  // weights pass from memory once; many by rows, as many to each thread.
  const int64_t panels = at::divup(call.c_out, kernel.linear_columns);
  const bool few = call.rows <= most;
  const int64_t parts = few ? std::min(threads, panels) : 1;
  const int64_t blocks = few ? 1 : at::divup(at::divup(call.rows, most), threads) * threads;
  const int64_t of_block = at::divup(call.rows, blocks);
  const int64_t rows = at::divup(of_block, kernel.block_rows) * kernel.block_rows;
  const int64_t columns = at::divup(panels, parts) * kernel.linear_columns;
  const int64_t tasks = at::divup(call.rows, rows) * parts;
  parallel(tasks, rows * columns * call.c_in, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_of(kernel.linear_scratch(call, rows));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / parts * rows, j = i % parts * columns;
      if (j >= call.c_out) continue;
      const LinearTask task = {r, std::min(r + rows, call.rows), j,
                               std::min(j + columns, call.c_out)};
      kernel.run_linear(call, task, scratch.get());
    }
  });
}

// norm(x) w^T + bias + residual for rows x [.. c_in]; gated: value * gelu(gate) of its halves.
Tensor linear(const Tensor& x, const Tensor& weight, int64_t c_out, const OptionalTensor& bias,
              const OptionalTensor& gain, const OptionalTensor& offset, double eps, bool gated,
              const OptionalTensor& residual) {
  const at::ScalarType type = computing_type(x.scalar_type()), sums = accumulator(type);
  const Kernel& kernel = kernel_for(type);
  const int64_t c_in = x.size(-1), size = kernel.linear_bytes(c_out, c_in);
  TORCH_CHECK(c_in % kLinearChannels == 0, "snoopi: x must have a multiple of ", kLinearChannels,
              " channels, got ", x.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == size && size > 0 &&
                  weight.scalar_type() == at::kByte && weight.is_contiguous(),
              "snoopi: a packed weight of ", c_in, " to ", c_out, " channels must be [", size,
              "] bytes, got ", weight.sizes(), "; pack_linear makes it, for this processor");
  TORCH_CHECK(!gated || (c_out % (2 * kernel.vector) == 0 && !residual.has_value()),
              "snoopi: a gated layer has a multiple of ", 2 * kernel.vector,
              " outputs and no residual, got ", c_out, " outputs");
  const Tensor input = x.to(type).contiguous();
  Linear call = {};
  call.rows = x.numel() / std::max<int64_t>(c_in, 1), call.c_in = c_in, call.c_out = c_out;
  call.gated = gated, call.eps = eps;
  call.x = input.const_data_ptr();
  call.weight = weight.const_data_ptr();
  Tensor scales, shifts, sum, rest;
  TORCH_CHECK(gain.has_value() == offset.has_value(), "snoopi: gain and offset come together");
  if (gain.has_value()) {
    TORCH_CHECK(gain->numel() == c_in && offset->numel() == c_in, "snoopi: a norm must be [", c_in,
                "], got ", gain->sizes(), " and ", offset->sizes());
    scales = gain->to(sums).contiguous(), shifts = offset->to(sums).contiguous();
    call.gain = scales.const_data_ptr(), call.offset = shifts.const_data_ptr();
  }
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == c_out, "snoopi: bias must be [", c_out,
                "], got ", bias->sizes());
    sum = gated ? paired(bias->to(sums), kernel.vector) : bias->to(sums).contiguous();
    call.added = sum.const_data_ptr();
  }
  at::DimVector sizes(x.sizes());
  sizes.back() = gated ? c_out / 2 : c_out;
  const Tensor out = at::empty(sizes, x.options().dtype(type));
  if (residual.has_value()) {
    TORCH_CHECK(residual->sizes() == out.sizes(), "snoopi: residual must be ", out.sizes(),
                ", got ", residual->sizes());
    rest = residual->to(type).contiguous();
    call.residual = rest.const_data_ptr();
  }
  call.out = out.mutable_data_ptr();
  if (out.numel() > 0) run(call, kernel);
  return out.scalar_type() == x.scalar_type() ? out : out.to(x.scalar_type());
}

}  // namespace
}  // namespace snoopi

TORCH_LIBRARY_IMPL(snoopi, CPU, m) {
  m.impl("linear", &snoopi::linear);
  m.impl("pack_linear", &snoopi::pack_linear);
  m.impl("pack_geglu", &snoopi::pack_geglu);
}

TORCH_LIBRARY_FRAGMENT(snoopi, m) {
  // Bytes of a packed weight (0: not to be packed).
  m.def("linear_bytes(int c_out, int c_in, ScalarType dtype) -> int",
        [](int64_t c_out, int64_t c_in, at::ScalarType dtype) {
          return snoopi::kernel_for(snoopi::computing_type(dtype)).linear_bytes(c_out, c_in);
        });
}

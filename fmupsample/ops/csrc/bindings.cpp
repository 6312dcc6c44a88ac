// The kernels as PyTorch operators. They check what would make a kernel read outside its maps; the
// friendly messages are in fmupsample/ops/reassembly.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <tuple>

#include "problem.h"
#include "scores.h"

#ifdef FMUPSAMPLE_EMULATED
#define FMUPSAMPLE_NAMESPACE fmupsample_emulated
#define FMUPSAMPLE_DEVICE CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#define FMUPSAMPLE_NAMESPACE fmupsample_cuda
#define FMUPSAMPLE_DEVICE CUDA
#endif

namespace fmupsample {
namespace {

Scalar scalar_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Scalar::f64;
    case at::kFloat:
      return Scalar::f32;
    case at::kHalf:
      return Scalar::f16;
    case at::kBFloat16:
      return Scalar::bf16;
    default:
      TORCH_CHECK(false, "fmupsample: no kernel for tensors of ", tensor.scalar_type());
  }
}

Map map_of(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() == 4, "fmupsample: a map has four axes, got ", tensor.dim());
  Map map{tensor.data_ptr(), scalar_of(tensor), {}, {}};
  for (int d = 0; d < 4; ++d) {
    map.size[d] = tensor.size(d);
    map.stride[d] = tensor.stride(d);
    TORCH_CHECK(d == 0 || map.size[d] <= (1 << 30), "fmupsample: an axis of ", map.size[d],
                " elements is too long");
  }
  return map;
}

void check_fit(const at::Tensor& low, const at::Tensor& high, int64_t kernel_size) {
  TORCH_CHECK(low.device() == high.device(), "fmupsample: tensors on ", low.device(), " and ",
              high.device());
  TORCH_CHECK(low.size(0) == high.size(0), "fmupsample: batches of ", low.size(0), " and ",
              high.size(0));
  TORCH_CHECK(low.size(2) > 0 && low.size(3) > 0 && high.size(2) >= low.size(2) &&
                  high.size(3) >= low.size(3),
              "fmupsample: ratios below 1 are not upsampling");
  TORCH_CHECK(kernel_size % 2 == 1 && kernel_size <= 7, "fmupsample: no kernel for K = ",
              kernel_size);
}

int kernel_size_of(const at::Tensor& weights) {
  int k = 1;
  while (int64_t(k + 2) * (k + 2) <= weights.size(1)) k += 2;
  TORCH_CHECK(int64_t(k) * k == weights.size(1), "fmupsample: ", weights.size(1),
              " weights are not an odd square");
  return k;
}

#ifdef FMUPSAMPLE_EMULATED
int32_t emulated_capability = 90;

struct Guard {
  explicit Guard(const at::Tensor&) {}
  Device device() const { return {nullptr, emulated_capability}; }
};
#else
// Makes the tensor's device current, and finds its stream.
struct Guard {
  explicit Guard(const at::Tensor& tensor) : guard(tensor.device()) {}
  Device device() const {
    int current = 0, major = 0, minor = 0;
    cudaGetDevice(&current);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, current);
    return {c10::cuda::getCurrentCUDAStream().stream(), 10 * major + minor};
  }
  c10::cuda::CUDAGuard guard;
};
#endif

at::Tensor empty(const at::Tensor& like, at::IntArrayRef size, at::ScalarType type,
                 at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  auto out = like.new_empty(size, like.options().dtype(type));
  return format == at::MemoryFormat::Contiguous ? out : out.contiguous(format);
}

at::Tensor reassemble_op(const at::Tensor& value, const at::Tensor& weights, bool fractional) {
  const int k = kernel_size_of(weights);
  check_fit(value, weights, k);
  const Guard guard(value);
  // Channels-last in, channels-last out, as the operators in Python promise.
  const bool last =
      value.is_contiguous(at::MemoryFormat::ChannelsLast) && !value.is_contiguous();
  const at::Tensor out =
      empty(value, {value.size(0), value.size(1), weights.size(2), weights.size(3)},
            value.scalar_type(),
            last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (out.numel()) reassemble(map_of(value), map_of(weights), map_of(out), k, fractional,
                              guard.device());
  return out;
}

at::Tensor grad_weights_op(const at::Tensor& grad, const at::Tensor& value, int64_t kernel_size,
                           bool fractional) {
  check_fit(value, grad, kernel_size);
  TORCH_CHECK(grad.size(1) == value.size(1), "fmupsample: gradient and value differ in channels");
  const Guard guard(grad);
  const auto type = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor dense = grad.contiguous();
  at::Tensor out =
      empty(grad, {grad.size(0), kernel_size * kernel_size, grad.size(2), grad.size(3)}, type);
  if (grad.numel() == 0) return out.zero_();
  grad_weights(map_of(dense), map_of(value), map_of(out), static_cast<int>(kernel_size),
               fractional, guard.device());
  return out;
}

at::Tensor grad_value_op(const at::Tensor& grad, const at::Tensor& weights, int64_t h, int64_t w,
                         bool fractional) {
  const int k = kernel_size_of(weights);
  const Guard guard(grad);
  const at::Tensor dense = grad.contiguous();
  at::Tensor out = empty(grad, {grad.size(0), grad.size(1), h, w}, grad.scalar_type());
  check_fit(out, grad, k);
  check_fit(out, weights, k);
  TORCH_CHECK(grad.size(2) == weights.size(2) && grad.size(3) == weights.size(3),
              "fmupsample: gradient and weights differ in size");
  if (grad.numel() == 0) return out.zero_();
  const auto type = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor partial =
      empty(grad, {grad_value_partial_size(map_of(dense), map_of(out), k, fractional)}, type);
  grad_value(map_of(dense), map_of(weights), partial.data_ptr(), map_of(out), k, fractional,
             guard.device());
  return out;
}

const float* floats(const at::Tensor& tensor, at::IntArrayRef size, const at::Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
                  tensor.sizes() == size && tensor.device() == like.device(),
              "fmupsample: partial_scores needs dense float32 tensors of its shape on one device, "
              "got ", tensor.sizes(), " for ", size);
  return tensor.data_ptr<float>();
}

std::tuple<at::Tensor, at::Tensor> partial_scores_op(
    const at::Tensor& query, const std::optional<at::Tensor>& key, int64_t stride_y,
    int64_t stride_x, const std::optional<at::Tensor>& low,
    const std::optional<at::Tensor>& key_weight, const at::Tensor& query_weight,
    const at::Tensor& offset, const at::Tensor& mix_weight, const at::Tensor& mix_bias,
    const at::Tensor& score_weight) {
  using S = ScoreShape;
  constexpr int64_t e = S::kGroups * S::kEmbedding, m = S::kGroups * S::kMiddle;
  TORCH_CHECK(query.dim() == 4 && query.numel() > 0 && key.has_value() != low.has_value() &&
                  key.has_value() == key_weight.has_value(),
              "fmupsample: partial_scores needs a query and either a key with weights or a low map");
  const int64_t b = query.size(0), height = query.size(2), width = query.size(3);
  TORCH_CHECK(height * width < INT32_MAX, "fmupsample: a map of ", height, " x ", width,
              " pixels is too large");
  const Guard guard(query);
  ScoreTask task{};
  task.batch = static_cast<int32_t>(b);
  task.height = static_cast<int32_t>(height);
  task.width = static_cast<int32_t>(width);
  task.query = floats(query, {b, e, height, width}, query);
  if (key) {
    task.key = floats(*key, {b, e, height, width}, query);
    task.key_weight =
        floats(*key_weight, {b, S::kGroups, S::kNeighbours * S::kEmbedding, S::kMiddle}, query);
    task.stride_y = static_cast<int32_t>(stride_y);
    task.stride_x = static_cast<int32_t>(stride_x);
  } else {
    TORCH_CHECK(low->dim() == 4 && low->size(2) > 2 && low->size(3) > 2,
                "fmupsample: the low map is padded by one cell on every side");
    task.low = floats(*low, {b, m, low->size(2), low->size(3)}, query);
    task.h = static_cast<int32_t>(low->size(2) - 2);
    task.w = static_cast<int32_t>(low->size(3) - 2);
    TORCH_CHECK(task.h <= height && task.w <= width, "fmupsample: ratios below 1");
  }
  task.query_weight = floats(query_weight, {b, S::kGroups, S::kEmbedding, S::kMiddle}, query);
  task.offset = floats(offset, {b, m}, query);
  task.mix_weight = floats(mix_weight, {S::kGroups, S::kMiddle, S::kMiddle}, query);
  task.mix_bias = floats(mix_bias, {m}, query);
  task.score_weight = floats(score_weight, {m, S::kNeighbours}, query);
  at::Tensor partial =
      empty(query, {b, S::kNormGroups, S::kNeighbours, height, width}, at::kFloat);
  at::Tensor sums =
      empty(query, {b, score_blocks(task.height, task.width), S::kNormGroups, 2}, at::kDouble);
  task.partial = partial.data_ptr<float>();
  task.sums = sums.data_ptr<double>();
  partial_scores(task, guard.device());
  return {partial, sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FMUPSAMPLE_NAMESPACE, m) {
  m.def("reassemble(Tensor value, Tensor weights, bool fractional) -> Tensor");
  m.def("grad_value(Tensor grad, Tensor weights, int h, int w, bool fractional) -> Tensor");
  m.def("grad_weights(Tensor grad, Tensor value, int kernel_size, bool fractional) -> Tensor");
  m.def(
      "partial_scores(Tensor query, Tensor? key, int stride_y, int stride_x, Tensor? low, "
      "Tensor? key_weight, Tensor query_weight, Tensor offset, Tensor mix_weight, "
      "Tensor mix_bias, Tensor score_weight) -> (Tensor partial, Tensor sums)");
}

TORCH_LIBRARY_IMPL(FMUPSAMPLE_NAMESPACE, FMUPSAMPLE_DEVICE, m) {
  m.impl("reassemble", reassemble_op);
  m.impl("grad_value", grad_value_op);
  m.impl("grad_weights", grad_weights_op);
  m.impl("partial_scores", partial_scores_op);
}

}  // namespace fmupsample

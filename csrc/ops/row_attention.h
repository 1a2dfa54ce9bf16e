// Attention of one query row at a time over the keys that the row sees.
#pragma once

#include "ops/call.h"

namespace lora_ext {

// q (B, H, T, D), k (B, G, L, D), v (B, G, L, E) -> (B, H, T, E), a view of (B, T, H, E).
// spans (B or 1, T, 2) int64, mask (B or 1, T, L) bool.
Tensor row_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
                     const OptionalTensor& spans, const OptionalTensor& mask);

}  // namespace lora_ext

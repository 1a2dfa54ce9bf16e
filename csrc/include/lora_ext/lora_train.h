// Training of batched multi-adapter LoRA: what csrc/ops may call beyond lora.h.
//
// Forward, with s = adapter_ids[t], m the dropout mask of (t, i) in {0, 1}, c = scale[s] / (1 - p):
//
//   v[t, :] = c * a[s] (m[t, :] * x[t, :])             float32 (float64)
//   y[t, :] = x[t, :] W^T + bias + b[s] v[t, :]
//
// Backward, from dy (T, O); every sum over tokens runs over the rows of one adapter alone:
//
//   dv[t, :] = c * dy[t, :] b[s]                       float32 (float64)
//   db[s]    = sum_t dy[t, :]^T v[t, :]
//   da[s]    = sum_t dv[t, :]^T (m[t, :] * x[t, :])
//   dx[t, :] = dy[t, :] W + m[t, :] * (dv[t, :] a[s])
//
// The products with W are a library's GEMM, called by csrc/ops; all else is here. 1 / (1 - p) sits
// in c, so the mask multiplies by 0 or 1 and no element of x is ever rounded.
//
// Sums over tokens: accumulated in float32 (float64), in an order that depends on the adapter's own
// rows and on the largest rank R of the bank: never on threads, nor on which other adapters share
// the batch. A row of another adapter is not read, so its NaN stays its own.
//
// Source: LoRA (Hu et al. 2021), eq. 3, differentiated; segments as in Punica (Chen et al. 2023).
#pragma once

#include "lora_ext/lora.h"

namespace lora_ext {

// Dropout of the adapters' input: the element (row, column) of x is kept if
//   word >= threshold,   word = Philox4x32-10(key, counter)[column % 4]
//   key = {low, high half of the seed},   counter = {row, column / 4, 0, 0}
// so that forward, backward, twins and kernels drop the same elements without storing a mask.
// `row` is the row's number in the batch. With a seed per adapter it is the row's place among the
// rows of its adapter, slot_begin[s] being place 0: so the mask has nothing of the rest of the
// batch, nor of the slot.
// Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
struct LoraDropout {
    const int64_t* seed = nullptr;  // beside x: a captured graph may change it
    uint32_t threshold = 0;         // round(p * 2^32); 0: keep everything, the seed is not read
    float inverse_keep = 1.0f;      // 1 / (1 - p)
    double inverse_keep_f64 = 1.0;  // the same, for float64
    bool per_adapter = false;       // seed has one number for each adapter, else one for all
};

struct LoraTrainArgs {
    LoraArgs lora;  // dtype, bank (plain tensors, no page_table), plan (always), x and v; not y
    LoraDropout dropout;
    const void* dy = nullptr;  // (T, O), rows dy_row_stride elements apart, O contiguous
    int64_t dy_row_stride = 0;
    void* dv = nullptr;  // (T, >= max_rank) scratch of v's type; only active rows are written
    int64_t dv_row_stride = 0;
    // Results; nullptr: not wanted.
    void* dx = nullptr;  // (T, I), added to in place: round(dx + ...); I contiguous
    int64_t dx_row_stride = 0;
    void* da = nullptr;         // (A, R, I) contiguous, dtype of x; all written, zero beyond a rank
    void* db = nullptr;         // (A, O, R) contiguous, likewise
    void* workspace = nullptr;  // of the launcher's own size, below; CUDA only
};

// CPU twins: one table per instruction set, from isa.h. ops splits [0, items) over threads; no bit
// depends on how. dv is called first, then db and da_dx in any order.
struct LoraTrainCpu {
    const char* isa;
    // x -> v with dropout. Items are (span of ranks, chunk), as in LoraCpu::shrink.
    int64_t (*shrink_items)(const LoraTrainArgs&);
    void (*shrink)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // dy -> dv. Items are (span, chunk).
    int64_t (*dv_items)(const LoraTrainArgs&);
    void (*dv)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // dy, v -> db. Items are (adapter, span, band of outputs).
    int64_t (*db_items)(const LoraTrainArgs&);
    void (*db)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // x, dv -> da and dx, whichever is wanted. Up to kRankSpan ranks items are (adapter, band of
    // inputs), and each row of x and dx is visited once. Above, they are those of da, (adapter,
    // span, band), then those of dx, (block of inputs, chunk).
    int64_t (*da_dx_items)(const LoraTrainArgs&);
    void (*da_dx)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // y[t, i] = x[t, i] / (1 - p) where kept, else 0; in the dtype of x, rounded once. Items are
    // rows of x and y, bank.in_features wide.
    void (*dropout)(const LoraTrainArgs&, int64_t begin, int64_t end);
};

// CUDA launchers: asynchronous, on `stream`, no allocation, no synchronisation.
// The sizes of workspaces follow from sizes alone, never from what pointers point at.
int64_t lora_train_shrink_workspace_bytes(const LoraTrainArgs& args);
int64_t lora_train_backward_workspace_bytes(const LoraTrainArgs& args);
LaunchStatus launch_lora_train_shrink(const LoraTrainArgs& args, void* stream);    // x -> v
LaunchStatus launch_lora_train_backward(const LoraTrainArgs& args, void* stream);  // dy -> the rest
// x -> y, which is contiguous.
LaunchStatus launch_lora_dropout(const LoraTrainArgs& args, void* y, void* stream);

}  // namespace lora_ext

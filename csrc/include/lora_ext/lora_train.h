// Training of batched multi-adapter LoRA: the part of the interface beyond lora.h.
//
// Forward, with s = adapter_ids[t], m the dropout mask of (t, i) in {0, 1}, c = scale[s] / (1 - p):
//
//   v[t, :] = c * a[s] (m[t, :] * x[t, :])             float32 (float64)
//   y[t, :] = x[t, :] W^T + bias + b[s] v[t, :]
//
// Backward, from dy (T, O); every sum over tokens covers only the rows of one adapter:
//
//   dv[t, :] = c * dy[t, :] b[s]                       float32 (float64)
//   db[s]    = sum_t dy[t, :]^T v[t, :]
//   da[s]    = sum_t dv[t, :]^T (m[t, :] * x[t, :])
//   dx[t, :] = dy[t, :] W + m[t, :] * (dv[t, :] a[s])
//
// The products with W are a library's GEMM, called by csrc/ops; kernels or CPU twins do the rest. c
// contains 1 / (1 - p), so the mask multiplies by 0 or 1 and no element of x is ever rounded.
//
// With factors (lora.h), `v` is stored without the weight w of its row and page. With u = dy[t, :]
// b[s]:
//
//   weighed[t, :] = w * v[t, :],  dv[t, :] = (c * u) * w,  dweights[t, g] = <u, v> over group g
//
// and db is computed from `weighed`. Without weights, `weighed` is not stored, because it equals v.
//
// Sums over tokens are accumulated in float32 (float64). Their order depends only on the adapter's
// own rows and on the largest rank R of the bank, not on threads or on other adapters of the batch.
// Rows of other adapters are not read, so their NaN do not spread.
//
// Source: LoRA (Hu et al. 2021), eq. 3, differentiated; segments as in Punica (Chen et al. 2023).
#pragma once

#include "lora_ext/lora.h"

namespace lora_ext {

// Dropout of the adapters' input: the element (row, column) of x is kept if
//   word >= threshold,   word = Philox4x32-10(key, counter)[column % 4]
//   key = {low, high half of the seed},   counter = {row, column / 4, k, 0}
// so that forward, backward, twins and kernels drop the same elements without storing a mask. `row`
// is the row's number in the batch. With a seed per adapter it is the row's position among the rows
// of its adapter, counted from slot_begin[s]: the mask then depends neither on the rest of the
// batch nor on the slot. `k` is the column of the ids, 0 if a row has one id.
// Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
struct LoraDropout {
    const int64_t* seed = nullptr;  // on the device of x: a captured graph may change it
    uint32_t threshold = 0;         // round(p * 2^32); 0: keep everything, the seed is not read
    float inverse_keep = 1.0f;      // 1 / (1 - p)
    double inverse_keep_f64 = 1.0;  // 1 / (1 - p) for float64
    bool per_adapter = false;       // true if seed has one number per adapter, else one for all
    uint32_t column = 0;            // k
};

struct LoraTrainArgs {
    LoraArgs lora;  // dtype, bank (plain tensors, no page_table), plan (always), x and v; not y
    LoraDropout dropout;
    const void* dy = nullptr;  // (T, O), dy_row_stride elements between rows, O contiguous
    int64_t dy_row_stride = 0;
    void* dv = nullptr;  // (T, >= max_rank) scratch, dtype of v; only active rows are written
    int64_t dv_row_stride = 0;
    // Results; nullptr: not wanted.
    void* dx = nullptr;  // (T, I), updated in place: round(dx + ...); I contiguous
    int64_t dx_row_stride = 0;
    // (A, R, I) contiguous, dtype of x. All elements are written: 0 beyond the rank of an adapter.
    void* da = nullptr;
    void* db = nullptr;  // (A, O, R) contiguous, as for da
    // CPU only: adds to da and db, rounded once, and writes nothing for adapters without rows.
    bool accumulate = false;
    void* workspace = nullptr;  // size: see the functions below; CUDA only
    void* weighed = nullptr;    // (T, >= max_rank) scratch like dv; with weights only
    int64_t weighed_row_stride = 0;
    // (T, bank.num_groups) float32; gradients are added to the active rows. nullptr: not wanted.
    float* dweights = nullptr;
    int64_t dweights_row_stride = 0;
};

// Returns `args` without scales, weights and 1 / (1 - p), for a product that computes only the
// sums.
inline LoraTrainArgs without_factors(LoraTrainArgs args) {
    args.lora = without_factors(args.lora);
    args.dropout.inverse_keep = 1.0f;
    args.dropout.inverse_keep_f64 = 1.0;
    return args;
}

// CPU twins: one table per instruction set, from isa.h. csrc/ops splits [0, items) over threads,
// and the split does not change the result. dv runs first, then db and da_dx in any order.
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
    // x, dv -> da and dx, each only if wanted. Up to kRankSpan ranks, items are (adapter, band of
    // inputs), and each row of x and dx is visited once. For more ranks, the items of da, (adapter,
    // span, band), are followed by those of dx, (block of inputs, chunk).
    int64_t (*da_dx_items)(const LoraTrainArgs&);
    void (*da_dx)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // With factors, shrink and dv omit c, and these two functions apply it. Items are chunks.
    // v = c * v; if wanted, weighed = v * w
    void (*weigh)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // On entry dv is u. Each if requested: dweights += <u, v>; dv = (c * u) * w; weighed = v * w
    void (*weigh_back)(const LoraTrainArgs&, int64_t begin, int64_t end);
    // y[t, i] = x[t, i] / (1 - p) if kept, else 0; in the dtype of x, rounded once. Items are rows
    // of x and y, bank.in_features wide.
    void (*dropout)(const LoraTrainArgs&, int64_t begin, int64_t end);
};

// CUDA launchers: asynchronous, on `stream`, no allocation, no synchronisation. The size of a
// workspace depends only on the sizes in `args`, never on the data behind pointers.
int64_t lora_train_shrink_workspace_bytes(const LoraTrainArgs& args);
int64_t lora_train_backward_workspace_bytes(const LoraTrainArgs& args);
// x -> v, and with weights v -> weighed
LaunchStatus launch_lora_train_shrink(const LoraTrainArgs& args, void* stream);
LaunchStatus launch_lora_train_backward(const LoraTrainArgs& args, void* stream);  // dy -> results
// Dropout alone: x -> y, with y contiguous.
LaunchStatus launch_lora_dropout(const LoraTrainArgs& args, void* y, void* stream);

}  // namespace lora_ext

// Launchers of a module without kernels: each returns an error that explains why it cannot launch.
// Linked only into such modules.
#include "lora_ext/circuit.h"
#include "lora_ext/circuit_decode.h"
#include "lora_ext/circuit_layers.h"
#include "lora_ext/circuit_sum.h"
#include "lora_ext/depth_mix.h"
#include "lora_ext/lora_gram.h"
#include "lora_ext/lora_train.h"
#include "lora_ext/packed_bits.h"
#include "lora_ext/row_attention.h"
#include "lora_ext/vocab.h"

namespace lora_ext {

#define LX_NO_KERNEL(launcher, ...)      \
    LaunchStatus launcher(__VA_ARGS__) { \
        return -1;                       \
    }

const char* launch_status_string(LaunchStatus) {
    return "this build of lora_ext has no CUDA kernels; rebuild it with LORA_EXT_CUDA=1, which "
           "needs nvcc";
}

LX_NO_KERNEL(launch_lora_plan, const LoraPlanArgs&, void*)
LX_NO_KERNEL(launch_lora_segment_ids, const int32_t*, const int32_t*, int32_t, int32_t*, int64_t,
             void*)
bool lora_reads_float8(const LoraArgs&) {
    return false;
}
int64_t lora_workspace_bytes(const LoraArgs&) {
    return 0;
}
LX_NO_KERNEL(launch_lora_shrink, const LoraArgs&, void*)
LX_NO_KERNEL(launch_lora_expand, const LoraArgs&, void*)
LX_NO_KERNEL(launch_lora_apply, std::span<const LoraArgs>, void*)
int64_t lora_train_shrink_workspace_bytes(const LoraTrainArgs&) {
    return 0;
}
int64_t lora_train_backward_workspace_bytes(const LoraTrainArgs&) {
    return 0;
}
LX_NO_KERNEL(launch_lora_train_shrink, const LoraTrainArgs&, void*)
LX_NO_KERNEL(launch_lora_train_backward, const LoraTrainArgs&, void*)
LX_NO_KERNEL(launch_lora_dropout, const LoraTrainArgs&, void*, void*)
LX_NO_KERNEL(launch_lora_gram, const GramArgs&, void*)
LX_NO_KERNEL(launch_lora_pair_stats, const GramArgs&, void*)
LX_NO_KERNEL(launch_cross_entropy_update, const VocabArgs&, void*)
LX_NO_KERNEL(launch_cross_entropy_finish, const VocabArgs&, void*)
LX_NO_KERNEL(launch_cross_entropy_gradient, const VocabArgs&, void*)
LX_NO_KERNEL(launch_kl_update, const VocabArgs&, void*)
LX_NO_KERNEL(launch_kl_finish, const VocabArgs&, void*)
LX_NO_KERNEL(launch_kl_gradient, const VocabArgs&, void*)
int64_t circuit_workspace_bytes(const CircuitLogits&) {
    return 0;
}
int64_t spec_verify_workspace_bytes(const SpecVerifyArgs&) {
    return 0;
}
int64_t circuit_block_bytes() {
    return 0;
}
int64_t circuit_row_bytes(const CircuitLogits&) {
    return 0;
}
int64_t circuit_argmax_bytes(const CircuitLogits&) {
    return 0;
}
LX_NO_KERNEL(launch_circuit_sample, const CircuitSampleArgs&, void*)
LX_NO_KERNEL(launch_circuit_conditional_dist, const CircuitConditionalArgs&, void*)
LX_NO_KERNEL(launch_circuit_argmax, const CircuitArgmaxArgs&, void*)
LX_NO_KERNEL(launch_spec_verify, const SpecVerifyArgs&, void*)
LX_NO_KERNEL(launch_circuit_leaf, const CircuitLeafArgs&, void*)
LX_NO_KERNEL(launch_circuit_leaf_backward, const CircuitLeafArgs&, void*)
LX_NO_KERNEL(launch_circuit_scan, const CircuitScanArgs&, void*)
LX_NO_KERNEL(launch_circuit_scan_backward, const CircuitScanArgs&, void*)
LX_NO_KERNEL(launch_log_sum_weights, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_values, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_finish, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_ratios, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_dvalues, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_dweights, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_per_row, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_log_sum_per_row_backward, const LogSumArgs&, void*)
bool log_sum_fused_fits(const LogSumArgs&) {
    return false;
}
LX_NO_KERNEL(launch_log_sum_fused, const LogSumArgs&, bool, void*)
LX_NO_KERNEL(launch_log_max, const LogSumArgs&, void*)
LX_NO_KERNEL(launch_layers_weights, const LayersArgs&, void*)
LX_NO_KERNEL(launch_layers_forward, const LayersArgs&, void*)
LX_NO_KERNEL(launch_layers_backward, const LayersArgs&, void*)
LX_NO_KERNEL(launch_layers_dweights, const LayersArgs&, void*)
LX_NO_KERNEL(launch_layers_walk, const LayersArgs&, void*)
LX_NO_KERNEL(launch_circuit_table, const CircuitTableArgs&, void*)
LX_NO_KERNEL(launch_circuit_table_backward, const CircuitTableArgs&, void*)
LX_NO_KERNEL(launch_depth_mix, const DepthMixArgs&, void*)
LX_NO_KERNEL(launch_depth_mix_backward, const DepthMixArgs&, void*)
LX_NO_KERNEL(launch_pack_weight, const PackedBitsArgs&, void*)
LX_NO_KERNEL(launch_unpack_weight, const PackedBitsArgs&, void*)
int64_t packed_linear_workspace_bytes(const PackedBitsArgs&) {
    return 0;
}
LX_NO_KERNEL(launch_packed_linear, const PackedBitsArgs&, void*)
LX_NO_KERNEL(launch_row_attention, const RowAttentionArgs&, void*)

}  // namespace lora_ext

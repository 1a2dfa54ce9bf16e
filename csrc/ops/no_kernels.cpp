// A build without nvcc: every launcher exists and says why it cannot launch.
#if !defined(LORA_EXT_WITH_CUDA)

#include "lora_ext/circuit.h"
#include "lora_ext/circuit_sum.h"
#include "lora_ext/lora_train.h"

namespace lora_ext {

const char* launch_status_string(LaunchStatus) {
    return "this build of lora_ext has no CUDA kernels; rebuild it with nvcc on PATH "
           "(LORA_EXT_CUDA=1 makes a missing nvcc an error)";
}

LaunchStatus launch_lora_plan(const LoraPlanArgs&, void*) {
    return -1;
}
LaunchStatus launch_lora_segment_ids(const int32_t*, const int32_t*, int32_t, int32_t*, int64_t,
                                     void*) {
    return -1;
}
int64_t lora_workspace_bytes(const LoraArgs&) {
    return 0;
}
LaunchStatus launch_lora_shrink(const LoraArgs&, void*) {
    return -1;
}
LaunchStatus launch_lora_expand(const LoraArgs&, void*) {
    return -1;
}
LaunchStatus launch_lora_apply(const LoraArgs&, void*) {
    return -1;
}
int64_t lora_train_workspace_bytes(const LoraTrainArgs&) {
    return 0;
}
LaunchStatus launch_lora_train_shrink(const LoraTrainArgs&, void*) {
    return -1;
}
LaunchStatus launch_lora_train_backward(const LoraTrainArgs&, void*) {
    return -1;
}
LaunchStatus launch_lora_dropout(const LoraTrainArgs&, void*, void*) {
    return -1;
}
LaunchStatus launch_log_sum_weights(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_values(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_finish(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_ratios(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_dvalues(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_dweights(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_per_row(const LogSumArgs&, void*) {
    return -1;
}
LaunchStatus launch_log_sum_per_row_backward(const LogSumArgs&, void*) {
    return -1;
}
bool log_sum_fused_fits(const LogSumArgs&) {
    return false;
}
LaunchStatus launch_log_sum_fused(const LogSumArgs&, bool, void*) {
    return -1;
}
LaunchStatus launch_log_max(const LogSumArgs&, void*) {
    return -1;
}

LaunchStatus launch_circuit_leaf(const CircuitLeafArgs&, void*) {
    return -1;
}
LaunchStatus launch_circuit_leaf_backward(const CircuitLeafArgs&, void*) {
    return -1;
}
LaunchStatus launch_circuit_scan(const CircuitScanArgs&, void*) {
    return -1;
}
LaunchStatus launch_circuit_scan_backward(const CircuitScanArgs&, void*) {
    return -1;
}

}  // namespace lora_ext

#endif

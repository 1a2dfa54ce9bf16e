#include "lora_ext/common.h"
#include "lx/device.h"

namespace lora_ext {

const char* launch_status_string(LaunchStatus status) {
    return lx::status_string(status);
}

}  // namespace lora_ext

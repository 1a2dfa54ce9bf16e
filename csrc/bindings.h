// Functions of bindings.cpp that module.cpp calls.
#pragma once

namespace pybind11 {
class module_;
}

namespace lora_ext {

// Registers the ops with the dispatcher under the namespace `library`, once per process.
void register_ops(const char* library);
// Adds every op and the settings to the module.
void define_ops(pybind11::module_& m);

}  // namespace lora_ext

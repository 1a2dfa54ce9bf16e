// What module.cpp calls of bindings.cpp.
#pragma once

namespace pybind11 {
class module_;
}

namespace lora_ext {

// Makes the ops known to the dispatcher, as those of `library`, once in a process.
void register_ops(const char* library);
// Gives the module every op as a function, and the settings.
void define_ops(pybind11::module_& m);

}  // namespace lora_ext

// Errors for invalid arguments. All messages have one format,
//
//   <op>: <argument>: expected <what the op takes>, found <what was given>
//
// and are raised as ValueError before any memory is accessed.
#pragma once

#include <c10/util/Exception.h>

#include <ostream>
#include <tuple>

namespace lora_ext {

// Parts of a message. They are joined only if the message is raised.
template <class... Parts>
struct Words {
    std::tuple<Parts...> parts;

    friend std::ostream& operator<<(std::ostream& out, const Words& words) {
        std::apply([&](const Parts&... part) { (out << ... << part); }, words.parts);
        return out;
    }
};
template <class... Parts>
Words<Parts...> words(Parts... parts) {
    return {{parts...}};
}
template <class... Parts>
Words<Parts...> expected(Parts... parts) {
    return {{parts...}};
}
template <class... Parts>
Words<Parts...> found(Parts... parts) {
    return {{parts...}};
}

// `argument` is a name, or words() if the name has an index.
template <class Argument, class... Expected, class... Found>
[[noreturn]] void refuse(const char* op, const Argument& argument,
                         const Words<Expected...>& expected, const Words<Found...>& found) {
    C10_THROW_ERROR(ValueError,
                    c10::str(op, ": ", argument, ": expected ", expected, ", found ", found));
}
template <class Argument, class... Expected, class... Found>
inline void require(bool holds, const char* op, const Argument& argument,
                    const Words<Expected...>& expected, const Words<Found...>& found) {
    if (C10_UNLIKELY(!holds)) refuse(op, argument, expected, found);
}

}  // namespace lora_ext

// Text of reports, places in source code, and the functions of emu.h.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "emu/machine.h"

namespace lx::emu {

void set_options(const Options& options) {
    machine.options = options;
}
Options options() {
    return machine.options;
}
Counters counters() {
    return machine.counters;
}

std::vector<std::string> take_reports() {
    std::vector<std::string> taken;
    taken.swap(machine.reports);
    return taken;
}

std::string describe(const Thread& thread) {
    auto triple = [](const uint3& i) {
        return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) +
               ")";
    };
    return "thread " + triple(thread.self.thread_idx) + " of block " +
           triple(thread.self.block_idx);
}

std::string describe(const Place& place) {
    if (place.file) {
        const char* slash = strrchr(place.file, '/');
        return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
    }
    Dl_info info;
    if (!place.code || !dladdr(place.code, &info) || !info.dli_fname) return "unknown place";
    const auto offset = reinterpret_cast<uintptr_t>(place.code) -
                        // an address inside the call instruction
                        reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
    char hex[32];
    snprintf(hex, sizeof hex, "0x%zx", static_cast<size_t>(offset));
    std::string answer;
    const std::string command =
        std::string("addr2line -s -e '") + info.dli_fname + "' " + hex + " 2>/dev/null";
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char line[512];
        if (fgets(line, sizeof line, pipe)) answer.assign(line, strcspn(line, " \n"));
        pclose(pipe);
    }
    if (answer.empty() || answer[0] == '?') answer = std::string(info.dli_fname) + "+" + hex;
    return answer;
}

void report(const char* category, const Place& place, const std::string& text) {
    Machine& m = machine;
    const size_t key = std::hash<std::string_view>()(category) ^
                       (place.file ? std::hash<std::string_view>()(place.file) + 31 * place.line
                                   : std::hash<const void*>()(place.code) * 7);
    if (std::find(m.reported.begin(), m.reported.end(), key) != m.reported.end()) return;
    m.reported.push_back(key);
    if (m.num_reports++ >= m.options.max_reports) return;
    m.pending_reports.push_back(
        {std::string(category) + ": " + m.launch.kernel + ": " + text, place});
}

void finish_reports() {
    Machine& m = machine;
    for (auto& [line, place] : m.pending_reports) {
        if (place.file || place.code) line += " [" + describe(place) + "]";
        m.last_error += "\n  " + line;
        m.reports.push_back(std::move(line));
    }
    m.pending_reports.clear();
}

void fatal(const char* category, const Place& place, const std::string& text) {
    report(category, place, text);
    stop_launch();
}

}  // namespace lx::emu

namespace lx {

const char* status_string(int status) {
    static thread_local std::string text;
    switch (status) {
        case 0:
            return "no error";
        case 1:
            text = "invalid argument";
            break;
        case 9:
            text = "invalid configuration argument";
            break;
        case 719:
            text = "unspecified launch failure";
            break;
        default:
            text = "error " + std::to_string(status);
    }
    if (!emu::machine.last_error.empty()) text += "; emulator:" + emu::machine.last_error;
    return text.c_str();
}

int multiprocessors() {
    return emu::machine.options.multiprocessors;
}

int shared_memory_per_block() {
    return emu::machine.options.shared_memory;
}

int fill_bytes(void* pointer, int value, size_t bytes, void*) {
    memset(pointer, value, bytes);
    return 0;
}

}  // namespace lx

// Which instruction set is used.
#include <atomic>
#include <utility>

#include "ops.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace octavo {
namespace {

struct Candidate {
    const Kernels* table;
    std::string needs;
};

// Those that this CPU runs, best first.
std::vector<Candidate> candidates() {
    std::vector<Candidate> found;
    [[maybe_unused]] const auto add = [&](const Kernels* table, bool runs, const char* needs) {
        if (table && runs) found.push_back({table, needs});
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    add(avx512vbmi_kernels(),
        avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"),
        "avx512_vnni, avx512_vbmi, avx512_bf16");
    add(avx512vnni_kernels(), avx512, "avx512_vnni");
    add(avx2_kernels(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), "avx2, fma");
#elif defined(__aarch64__)
#if defined(__linux__)
    add(neon_kernels(), getauxval(AT_HWCAP) & HWCAP_ASIMDDP, "asimddp");
#elif defined(__APPLE__)
    add(neon_kernels(), true, "every Apple CPU has dotprod");
#endif
#endif
    found.push_back({generic_kernels(), ""});
    return found;
}

const std::vector<Candidate>& known() {
    static const std::vector<Candidate> all = candidates();
    return all;
}

std::atomic<const Candidate*> chosen{nullptr};

const Candidate& current() {
    const Candidate* one = chosen;
    return one ? *one : known().front();
}

}  // namespace

const Kernels& kernels() { return *current().table; }

std::string kernels_reason() {
    const Candidate& one = current();
    if (chosen) return "asked for";
    return one.needs.empty() ? "nothing better found" : "found " + one.needs;
}

std::vector<std::string> available_kernels() {
    std::vector<std::string> names;
    for (const Candidate& one : known()) names.emplace_back(one.table->name);
    return names;
}

bool choose_kernels(const std::string& name) {
    if (name.empty()) {
        chosen = nullptr;
        return true;
    }
    for (const Candidate& one : known()) {
        if (name != one.table->name) continue;
        chosen = &one;
        return true;
    }
    return false;
}

}  // namespace octavo

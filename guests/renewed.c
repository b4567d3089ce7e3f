/*
 * renewed SECONDS NANOSECONDS <entropy: sets the clock, mixes standard input into the kernel's random pool and makes the
 * generator take a new key from it.
 *
 * No program of busybox asks for that last step (the ioctl RNDRESEEDCRNG, random(4)), and without it guests that were
 * restored from one snapshot draw the same random bytes for up to a minute. It is freestanding, so that it depends on
 * no C library of the host that builds the guest. x86-64 only.
 */
typedef long word;

static word call(word number, word a, word b, word c) {
    word result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

enum { READ = 0, WRITE = 1, OPEN = 2, IOCTL = 16, EXIT = 60, CLOCK_SETTIME = 227 };
enum { WRITE_ONLY = 1, REALTIME = 0, RESEED = 0x5207 };

static word number(const char *text) {
    word value = 0;
    while (*text >= '0' && *text <= '9') value = value * 10 + (*text++ - '0');
    return value;
}

__attribute__((used)) static void run(word *stack) {
    word count = stack[0];
    char **arguments = (char **)(stack + 1);
    word failed = 0;
    if (count > 2) {
        word time[2] = {number(arguments[1]), number(arguments[2])};
        failed |= call(CLOCK_SETTIME, REALTIME, (word)time, 0) != 0;
    }
    char seed[512];
    word length = call(READ, 0, (word)seed, sizeof seed);
    word pool = call(OPEN, (word) "/dev/urandom", WRITE_ONLY, 0);
    failed |= length < 32 || pool < 0 || call(WRITE, pool, (word)seed, length) != length;
    failed |= call(IOCTL, pool, RESEED, 0) != 0;
    call(EXIT, failed, 0, 0);
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run\n");

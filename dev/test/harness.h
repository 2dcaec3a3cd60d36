// harness.h: what every test section uses. One expect() is one counted check; a section is a void function of no arguments.
#pragma once
#include <sys/wait.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

static int tests_passed, tests_failed;

// count one check; a failed one prints where and why. Returns cond, so that a section can stop early.
#define expect(cond, ...) expect_at(!!(cond), __FILE__, __LINE__, #cond, __VA_ARGS__)
static int expect_at(int ok, const char* file, int line, const char* text, const char* format, ...) PRINTF_LIKE(5, 6);
static int expect_at(int ok, const char* file, int line, const char* text, const char* format, ...) {
    if (ok) {
        tests_passed++;
        return 1;
    }
    tests_failed++;
    printf("  FAIL %s:%d: %s\n       ", file, line, text);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    return 0;
}

// run(argument) in a child process: it must end with exit code `code`, and its stderr must contain `words`.
static void expect_exit(int code, const char* words, void (*run)(void*), void* argument) {
    char path[] = "/tmp/test_llama_XXXXXX";
    int fd = mkstemp(path);
    check(fd >= 0, "cannot create a temporary file: %s", strerror(errno));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(fd, STDERR_FILENO);
#ifdef __SANITIZE_ADDRESS__
        __lsan_disable();  // what die() leaves to the system is no leak
#endif
        run(argument);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    char text[4096] = {0};
    ssize_t got = pread(fd, text, sizeof text - 1, 0);
    close(fd);
    unlink(path);
    int ended = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    expect(ended == code && got >= 0 && strstr(text, words), "expected exit %d saying '%s', got %d: %s", code, words, ended,
           text);
}

// a fresh empty folder under /tmp; the caller removes it with remove_folder
static char* make_temp_folder(void) {
    char* path = strdup_or_die("/tmp/test_llama_XXXXXX");
    check(mkdtemp(path), "cannot create a temporary folder: %s", strerror(errno));
    return path;
}

static void remove_folder(char* path) {
    char* command = format_string("rm -rf '%s'", path);
    check(system(command) == 0, "cannot remove '%s'", path);
    free(command);
    free(path);
}

/*
 * A guest without an operating system, for a VMM that starts a 64-bit kernel, or, compiled for 32 bits, one
 * by PVH: fills memory with what it can compute again, and then looks at pages at random, changes half of them, and says how far it has come
 * on the first serial port. It says BAD once and stops if a page is not what it must be.
 *
 * It needs no interrupts, no tables of its own and few kinds of instructions, so that a KVM that
 * emulates runs it, too, if slowly.
 */

typedef unsigned long long u64;

#define PAGES 2048
#define WORDS 512
#define STEP 64

static volatile u64 *const memory = (u64 *)0x1000000;
static volatile u64 *const versions = (u64 *)0x400000;

static void put(const char *text)
{
	while (*text)
		__asm__ volatile("outb %0, %1" : : "a"(*text++), "Nd"((unsigned short)0x3f8));
}

static void number(unsigned value)
{
	char digits[12];
	int at = 11;

	digits[at] = 0;
	do
		digits[--at] = '0' + value % 10;
	while (value /= 10);
	put(digits + at);
}

static u64 word(u64 at, u64 version)
{
	u64 mixed = at * 0x9e3779b97f4a7c15ULL ^ version * 0xd1b54a32d192ed03ULL;

	return mixed ^ mixed >> 29;
}

static void fill(u64 page)
{
	for (u64 at = page * WORDS; at < (page + 1) * WORDS; at += STEP)
		memory[at] = word(at, versions[page]);
}

static void check(u64 page)
{
	for (u64 at = page * WORDS; at < (page + 1) * WORDS; at += STEP)
		if (memory[at] != word(at, versions[page])) {
			put("BAD page ");
			number(page);
			put("\n");
			for (;;)
				;
		}
}

__attribute__((used)) static void work(void)
{
	u64 seed = 1;

	for (u64 page = 0; page < PAGES; page++) {
		versions[page] = 0;
		fill(page);
	}
	put("ready\n");
	for (u64 count = 1;; count++) {
		for (int step = 0; step < 32; step++) {
			u64 page;

			seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
			page = (seed >> 33) % PAGES;
			check(page);
			if (seed >> 63) {
				versions[page]++;
				fill(page);
			}
		}
		put("count ");
		number(count);
		put("\n");
	}
}

#ifdef __i386__
__asm__(".globl _start\n_start: mov $0x900000, %esp\ncall work\n"
	".section .note.pvh, \"a\", @note\n.align 4\n"
	".long 4, 4, 18\n.asciz \"Xen\"\n.long _start\n");
#else
__asm__(".globl _start\n_start: mov $0x900000, %rsp\ncall work\n");
#endif

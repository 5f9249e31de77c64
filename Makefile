# Every target is one line; `make help` lists them.
.PHONY: demo test test-host check bench fuzz help
demo: ; cargo xtask demo
test: ; cargo xtask test
test-host: ; cargo xtask test-host
check: ; cargo xtask check
bench: ; cargo xtask bench
fuzz: ; cargo xtask fuzz
help: ; cargo xtask help

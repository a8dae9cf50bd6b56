# Two commands matter: `make demo` and `make test`. Both install what they need.
BUILD := gcc g++ libc6-dev
RUN := qemu-system-x86 ovmf mmdebstrap iproute2 nftables openssh-client e2fsprogs \
	grub-common grub-pc-bin grub-efi-amd64-bin
TEST := $(RUN) busybox-static kmod util-linux slirp4netns uidmap python3 isolinux syslinux-common genisoimage \
	curl openssl python3-venv nodejs npm protobuf-compiler qemu-utils dropbear-bin tmux bc bison flex \
	libelf-dev libncurses-dev bsdutils patch xz-utils bzip2 redis-server nginx netcat-openbsd tcpdump

.PHONY: demo test check vm-test bench build install

demo:
	@scripts/deps.sh $(BUILD) $(RUN)
	@cargo build --quiet --release
	@cargo xtask guest
	@scripts/demo.sh

build:
	@scripts/deps.sh $(BUILD)
	cargo build --release
	cargo xtask guest

# No root, no guest.
check:
	@scripts/deps.sh $(BUILD) e2fsprogs
	cargo xtask check

# Everything, real guests included.
test:
	@scripts/deps.sh $(BUILD) $(TEST)
	cargo xtask check
	cargo xtask fuzz
	cargo xtask vm-test

vm-test:
	@scripts/deps.sh $(BUILD) $(TEST)
	cargo xtask vm-test

bench:
	@scripts/deps.sh $(BUILD) $(TEST)
	cargo build --quiet --release
	cargo xtask guest
	cargo xtask bench

install: build
	install -D -m 0755 target/release/lodge $(DESTDIR)/usr/local/bin/lodge
	ln -sf lodge $(DESTDIR)/usr/local/bin/vmadm
	ln -sf lodge $(DESTDIR)/usr/local/bin/xc
	ln -sf lodge $(DESTDIR)/usr/local/bin/xcadmin
	mkdir -p $(DESTDIR)/usr/local/share/lodge
	cp -R guest/xcluster guest/vm-bootstrap $(DESTDIR)/usr/local/share/lodge/
	install -D -m 0755 target/release/lodge-jail $(DESTDIR)/usr/local/bin/lodge-jail
	install -D -m 0755 target/release/vm-bootstrap $(DESTDIR)/usr/local/bin/vm-bootstrap
	install -D -m 0644 dist/lodge.service $(DESTDIR)/etc/systemd/system/lodge.service
	install -D -m 0644 dist/lodge.socket $(DESTDIR)/etc/systemd/system/lodge.socket

package template

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	blockSize = 4096
	minDisk   = 64 << 20
	maxDisk   = 1 << 40

	fsUUID   = "77726e6e-0000-4000-8000-62617365726f"
	hashSeed = "77726e6e-0000-4000-8000-686173687365"
	fsLabel  = "wrenn-root"

	// envdInRootfs is where the guest agent lives in the disk image.
	envdDir      = "/usr/local/bin"
	envdName     = "envd"
	envdInRootfs = envdDir + "/" + envdName
)

// mkfsOptions are mke2fs's arguments but for the time, the source and the
// target. Everything is named, nothing comes from the host's mke2fs.conf:
//
//   - no metadata_csum: the store under the disk verifies every block, and the
//     times in inodes can be set without computing checksums;
//   - no 64bit, metadata_csum_seed, orphan_file: any kernel and any e2fsprogs
//     of the last ten years can read it;
//   - inode tables are written (they are zeros, holes in the file), so that the
//     guest's kernel does not start a thread that writes them and makes every
//     sandbox's disk dirty;
//   - a journal of 16 MiB: it is rewritten round and round, and all of it is
//     part of a snapshot;
//   - no reserved blocks: the user of a sandbox is its root.
var mkfsOptions = []string{
	"-q", "-F", "-b", strconv.Itoa(blockSize), "-I", "256", "-i", "16384",
	"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,flex_bg," +
		"sparse_super,large_file,huge_file,uninit_bg,dir_nlink,extra_isize",
	"-U", fsUUID, "-L", fsLabel, "-m", "0", "-J", "size=16", "-o", "Linux",
	"-E", "hash_seed=" + hashSeed + ",lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard",
}

// ext4Tools are the paths of e2fsprogs' programs.
type ext4Tools struct{ mke2fs, debugfs, e2fsck string }

// fixedTime makes e2fsprogs use epoch where it would use the clock. It is not
// SOURCE_DATE_EPOCH: later versions then also clamp the times of files, and
// compiled Python files no longer fit their sources.
func fixedTime(epoch int64) []string {
	return []string{
		"E2FSPROGS_FAKE_TIME=" + strconv.FormatInt(epoch, 10),
		"MKE2FS_CONFIG=/dev/null",
	}
}

// makeExt4 writes the directory root into a new sparse image of size bytes.
// Files whose time is madeAfter or later were made by the build and get epoch.
func (t ext4Tools) makeExt4(ctx context.Context, root, image string, size, epoch, madeAfter int64) error {
	f, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("creating the disk image: %w", err)
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err != nil {
		return fmt.Errorf("sizing the disk image: %w", err)
	}
	args := append([]string{}, mkfsOptions...)
	args = append(args, "-d", root, image, strconv.FormatInt(size/blockSize, 10))
	cmd := command{path: t.mke2fs, args: args, env: fixedTime(epoch)}
	if _, err := cmd.run(ctx); err != nil {
		return fmt.Errorf("making the file system: %w", err)
	}
	return fixTimes(image, epoch, madeAfter)
}

// addEnvd puts the binary into the image and proves it: the file system is
// checked and the file read back. debugfs reports errors on its output only,
// hence the proof. work is a scratch directory that holds the binary as "envd".
func (t ext4Tools) addEnvd(ctx context.Context, image, work string, digest [32]byte, epoch, madeAfter int64) error {
	script := strings.Join([]string{
		"cd " + envdDir,
		"write envd " + envdName,
		"set_inode_field " + envdName + " mode 0100755",
		"set_inode_field " + envdName + " uid 0",
		"set_inode_field " + envdName + " gid 0",
	}, "\n") + "\n"
	cmd := command{
		path: t.debugfs, args: []string{"-w", "-f", "-", image},
		dir: work, env: fixedTime(epoch), stdin: strings.NewReader(script),
	}
	output, err := cmd.run(ctx)
	if err != nil {
		return fmt.Errorf("adding envd to the disk image: %w", err)
	}
	if err := fixTimes(image, epoch, madeAfter); err != nil {
		return err
	}
	readBack := filepath.Join(work, "envd.readback")
	defer os.Remove(readBack)
	dump := command{path: t.debugfs, args: []string{"-R", "dump " + envdInRootfs + " envd.readback", image}, dir: work}
	if _, err := dump.run(ctx); err != nil {
		return fmt.Errorf("reading envd back: %w", err)
	}
	got, err := fileDigest(readBack)
	if err != nil || got != digest {
		return fmt.Errorf("envd is not in the disk image as it should be (%w); debugfs said:\n%s",
			errors.Join(err, errors.New("digest differs")), output)
	}
	return t.check(ctx, image)
}

// check runs e2fsck without letting it change anything.
func (t ext4Tools) check(ctx context.Context, image string) error {
	if _, err := (command{path: t.e2fsck, args: []string{"-f", "-n", image}}).run(ctx); err != nil {
		return fmt.Errorf("checking the file system: %w", err)
	}
	return nil
}

func fileDigest(path string) (digest [32]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return digest, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return digest, fmt.Errorf("reading %s: %w", path, err)
	}
	h.Sum(digest[:0])
	return digest, nil
}

// cloneSparse copies src to the new file dst: by sharing its extents where the
// file system can, else its data, leaving the holes.
func cloneSparse(ctx context.Context, src, dst string, progress func(done, total int64)) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("opening the image to copy: %w", err)
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return fmt.Errorf("copying the image: %w", err)
	}
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("creating the copy: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil
	}
	if err := out.Truncate(st.Size()); err != nil {
		return fmt.Errorf("sizing the copy: %w", err)
	}
	for off := int64(0); off < st.Size(); {
		data, err := unix.Seek(int(in.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole is left
		}
		if err != nil {
			return fmt.Errorf("looking for data in %s: %w", src, err)
		}
		hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("looking for holes in %s: %w", src, err)
		}
		if err := copyRange(ctx, out, in, data, hole); err != nil {
			return err
		}
		off = hole
		progress(off, st.Size())
	}
	return nil
}

// copyRange copies bytes [from,to) by the kernel (copy_file_range), in pieces
// between which it can be cancelled.
func copyRange(ctx context.Context, out, in *os.File, from, to int64) error {
	const piece = 32 << 20
	for from < to {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, err := in.Seek(from, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(from, io.SeekStart); err != nil {
			return err
		}
		n, err := io.CopyN(out, in, min(piece, to-from))
		if err != nil {
			return fmt.Errorf("copying the image: %w", err)
		}
		from += n
	}
	return nil
}

// usedBytes is how much of a sparse file is on disk.
func usedBytes(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}

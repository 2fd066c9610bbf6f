package template

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// ext4's on-disk format, as far as fixTimes needs it
// (kernel documentation, filesystems/ext4). All numbers are little endian.
const (
	superOffset = 1024
	superSize   = 1024
	extMagic    = 0xEF53

	sbInodesCount    = 0x00
	sbBlocksCount    = 0x04
	sbMountTime      = 0x2C
	sbWriteTime      = 0x30
	sbLastCheck      = 0x40
	sbLogBlockSize   = 0x18
	sbBlocksPerGroup = 0x20
	sbInodesPerGroup = 0x28
	sbMagic          = 0x38
	sbInodeSize      = 0x58
	sbIncompat       = 0x60
	sbROCompat       = 0x64
	sbMkfsTime       = 0x108

	incompat64bit        = 0x80
	roCompatMetadataCsum = 0x400

	descSize         = 32
	descInodeBitmap  = 0x04
	descInodeTable   = 0x08
	descFlags        = 0x12
	descInodesUninit = 0x1

	inodeSize       = 256
	inodeAtime      = 0x08
	inodeCtime      = 0x0C
	inodeMtime      = 0x10
	inodeCtimeExtra = 0x84
	inodeMtimeExtra = 0x88
	inodeAtimeExtra = 0x8C
	inodeCrtime     = 0x90
	inodeCrtimeEx   = 0x94
)

var le = binary.LittleEndian

// fixTimes makes the times in an ext4 image that this package made reproducible.
// mke2fs copies the change and access times of the source files, which nobody
// can set, and debugfs stamps what it touches. Afterwards:
//
//   - the access, change and creation time of every inode is epoch;
//   - the modification time stays where it is older than madeAfter (it came out
//     of a package, and compiled Python remembers it), else it is epoch;
//   - nanoseconds are zero, and so are the superblock's times but for epoch.
//
// It refuses an image with metadata checksums, which it would break.
func fixTimes(image string, epoch, madeAfter int64) (err error) {
	if epoch < 0 || epoch > 1<<31-1 {
		return fmt.Errorf("time %d does not fit an inode", epoch)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("opening the image: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sb, err := readSuper(f)
	if err != nil {
		return fmt.Errorf("superblock of %s: %w", image, err)
	}
	for g := range sb.groups {
		if err := fixGroup(f, sb, g, uint32(epoch), uint32(min(max(madeAfter, 0), 1<<31-1))); err != nil {
			return fmt.Errorf("block group %d of %s: %w", g, image, err)
		}
	}
	return sb.fixTimes(f, uint32(epoch))
}

type superblock struct {
	groups         int64
	blocksPerGroup int64
	inodesPerGroup int64
	descriptors    []byte
}

func readSuper(f *os.File) (*superblock, error) {
	var b [superSize]byte
	if _, err := f.ReadAt(b[:], superOffset); err != nil {
		return nil, err
	}
	if le.Uint16(b[sbMagic:]) != extMagic {
		return nil, errors.New("not an ext4 file system")
	}
	if le.Uint32(b[sbROCompat:])&roCompatMetadataCsum != 0 || le.Uint32(b[sbIncompat:])&incompat64bit != 0 {
		return nil, errors.New("has metadata_csum or 64bit, which this package never makes")
	}
	if size := 1024 << le.Uint32(b[sbLogBlockSize:]); size != blockSize {
		return nil, fmt.Errorf("blocks of %d bytes, want %d", size, blockSize)
	}
	if n := le.Uint16(b[sbInodeSize:]); n != inodeSize {
		return nil, fmt.Errorf("inodes of %d bytes, want %d", n, inodeSize)
	}
	sb := &superblock{
		blocksPerGroup: int64(le.Uint32(b[sbBlocksPerGroup:])),
		inodesPerGroup: int64(le.Uint32(b[sbInodesPerGroup:])),
	}
	blocks, inodes := int64(le.Uint32(b[sbBlocksCount:])), int64(le.Uint32(b[sbInodesCount:]))
	if sb.blocksPerGroup == 0 || sb.inodesPerGroup == 0 || sb.inodesPerGroup > 8*blockSize ||
		blocks > maxDisk/blockSize {
		return nil, errors.New("geometry out of bounds")
	}
	sb.groups = (blocks + sb.blocksPerGroup - 1) / sb.blocksPerGroup
	if inodes != sb.groups*sb.inodesPerGroup {
		return nil, fmt.Errorf("%d inodes in %d groups of %d", inodes, sb.groups, sb.inodesPerGroup)
	}
	sb.descriptors = make([]byte, sb.groups*descSize)
	if _, err := f.ReadAt(sb.descriptors, blockSize); err != nil {
		return nil, fmt.Errorf("reading group descriptors: %w", err)
	}
	return sb, nil
}

// fixGroup rewrites the used inodes of one group.
func fixGroup(f *os.File, sb *superblock, g int64, epoch, madeAfter uint32) error {
	d := sb.descriptors[g*descSize:]
	if le.Uint16(d[descFlags:])&descInodesUninit != 0 {
		return nil
	}
	bitmap := make([]byte, (sb.inodesPerGroup+7)/8)
	if _, err := f.ReadAt(bitmap, int64(le.Uint32(d[descInodeBitmap:]))*blockSize); err != nil {
		return fmt.Errorf("reading the inode bitmap: %w", err)
	}
	used := int64(0) // one more than the last used inode
	for i := range sb.inodesPerGroup {
		if bitmap[i/8]&(1<<(i%8)) != 0 {
			used = i + 1
		}
	}
	if used == 0 {
		return nil
	}
	table := make([]byte, used*inodeSize)
	off := int64(le.Uint32(d[descInodeTable:])) * blockSize
	if _, err := f.ReadAt(table, off); err != nil {
		return fmt.Errorf("reading the inode table: %w", err)
	}
	for i := range used {
		if bitmap[i/8]&(1<<(i%8)) != 0 {
			fixInode(table[i*inodeSize:(i+1)*inodeSize], epoch, madeAfter)
		}
	}
	if _, err := f.WriteAt(table, off); err != nil {
		return fmt.Errorf("writing the inode table: %w", err)
	}
	return nil
}

func fixInode(inode []byte, epoch, madeAfter uint32) {
	if le.Uint16(inode) == 0 { // mode 0: reserved and never used
		return
	}
	if le.Uint32(inode[inodeMtime:]) >= madeAfter {
		le.PutUint32(inode[inodeMtime:], epoch)
	}
	for _, field := range []int{inodeAtime, inodeCtime, inodeCrtime} {
		le.PutUint32(inode[field:], epoch)
	}
	for _, field := range []int{inodeAtimeExtra, inodeCtimeExtra, inodeMtimeExtra, inodeCrtimeEx} {
		le.PutUint32(inode[field:], 0)
	}
}

// fixTimes rewrites the times of the superblock and of its copies.
func (sb *superblock) fixTimes(f *os.File, epoch uint32) error {
	for g := range sb.groups {
		off := g * sb.blocksPerGroup * blockSize
		if g == 0 {
			off = superOffset
		} else if !hasBackup(g) {
			continue
		}
		var b [superSize]byte
		if _, err := f.ReadAt(b[:], off); err != nil {
			return fmt.Errorf("reading superblock %d: %w", g, err)
		}
		if le.Uint16(b[sbMagic:]) != extMagic {
			return fmt.Errorf("superblock %d is missing", g)
		}
		le.PutUint32(b[sbMountTime:], 0)
		for _, field := range []int{sbWriteTime, sbLastCheck, sbMkfsTime} {
			le.PutUint32(b[field:], epoch)
		}
		if _, err := f.WriteAt(b[:], off); err != nil {
			return fmt.Errorf("writing superblock %d: %w", g, err)
		}
	}
	return nil
}

// hasBackup reports whether group g has a copy of the superblock under
// sparse_super: 0, 1 and the powers of 3, 5 and 7.
func hasBackup(g int64) bool {
	if g <= 1 {
		return true
	}
	for _, base := range []int64{3, 5, 7} {
		n := base
		for n < g {
			n *= base
		}
		if n == g {
			return true
		}
	}
	return false
}

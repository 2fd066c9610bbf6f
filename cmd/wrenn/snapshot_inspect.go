package main

import (
	"errors"
	"fmt"
	"html"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"git.omukk.dev/wrenn/sandbox/snapshot"
	"git.omukk.dev/wrenn/sandbox/snapshot/format"
)

const inspectLong = `Tell what a snapshot is made of: how its bytes divide into data and zeros, which
generations they come from, and how scattered they are. NAME is a snapshot, a
base template, or the ID of a paused sandbox.

The picture shows each image from its first byte to its last: "." is zeros, a
letter is the generation in the table that most of that part comes from.

It reads the state directory itself and may run beside a server.`

func newSnapshotInspectCmd() *cobra.Command {
	var dir, svg string
	cmd := &cobra.Command{
		Use: "inspect NAME", Short: "Show which generations a snapshot's bytes come from", Long: inspectLong,
		Example: `  wrenn snapshot inspect warm-python
  wrenn snapshot inspect warm-python --svg warm-python.svg`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: completeFirst(completeTemplates("")),
		RunE: func(cmd *cobra.Command, a []string) error {
			store, err := openStore(dir, true)
			if err != nil {
				return err
			}
			defer store.Close()
			id, err := findManifest(store, a[0])
			if err != nil {
				return err
			}
			in, err := store.Inspect(cmd.Context(), id, pictureCells)
			if err != nil {
				return err
			}
			if svg != "" {
				if err := os.WriteFile(svg, []byte(inspectionSVG(in)), 0o644); err != nil {
					return fmt.Errorf("write the picture: %w", err)
				}
			}
			o := outputOf(cmd)
			if o.json {
				return o.printJSON(in)
			}
			return printInspection(o, in)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", stateDir(), "state directory")
	cmd.Flags().StringVar(&svg, "svg", "", "write the picture to this file, too")
	return cmd
}

// pictureCells is a whole number of lines of the terminal's picture.
const (
	pictureWidth = 64
	pictureCells = 16 * pictureWidth
)

func findManifest(store *snapshot.Store, name string) (format.ID, error) {
	manifests, errs := store.Manifests()
	var newest *snapshot.Manifest
	for i, m := range manifests {
		switch {
		case m.Kind != snapshot.KindPause && m.Name == name:
			return m.ID, nil
		case m.Kind == snapshot.KindPause && m.SandboxID == name && (newest == nil || m.Generation > newest.Generation):
			newest = &manifests[i]
		}
	}
	if newest != nil {
		return newest.ID, nil
	}
	if err := errors.Join(errs...); err != nil {
		return format.ID{}, fmt.Errorf("no readable snapshot is named %q: %w", name, err)
	}
	return format.ID{}, fmt.Errorf("there is no snapshot, template or paused sandbox %q in this store; `wrenn store usage` lists what there is", name)
}

// letters name builds in the picture. Images with more builds use them again.
const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

func letter(build int) string {
	if build == snapshot.CellZero {
		return "."
	}
	return letters[build%len(letters) : build%len(letters)+1]
}

func printInspection(o output, in snapshot.Inspection) error {
	m := in.Manifest
	err := o.fields([2]string{"Name", m.Name}, [2]string{"Kind", m.Kind}, [2]string{"Sandbox", m.SandboxID},
		[2]string{"Parent", m.Parent}, [2]string{"Generation", fmt.Sprint(m.Generation)},
		[2]string{"Device state", mebibytes(m.State.Size)}, [2]string{"VMM", strings.TrimSpace(m.VMM.Kind + " " + m.VMM.Version)})
	if err != nil {
		return err
	}
	for _, img := range in.Images {
		fmt.Fprintf(o.w, "\n%s: %s, of it %s data and %s zeros\n%d mappings, the longest run %s; header %d bytes; %d builds\n\n",
			img.Part, mebibytes(img.Size), mebibytes(img.DataBytes), mebibytes(img.ZeroBytes),
			img.Mappings, mebibytes(img.LongestRun), img.HeaderBytes, len(img.Builds))
		var rows [][]string
		for i, b := range img.Builds {
			rows = append(rows, []string{letter(i), generationName(b), mebibytes(b.UsedBytes), mebibytes(b.StoredBytes), fmt.Sprint(b.Mappings), b.ID.String()})
		}
		if err := o.table([]string{"", "GENERATION", "USED", "STORED", "MAPPINGS", "BUILD"}, rows); err != nil {
			return err
		}
		if err := drawCells(o.w, img.Cells); err != nil {
			return err
		}
	}
	return nil
}

func generationName(b snapshot.BuildInspection) string {
	if b.Generation < 0 {
		return "deleted"
	}
	return fmt.Sprint(b.Generation)
}

func drawCells(w io.Writer, cells []int) error {
	var b strings.Builder
	b.WriteByte('\n')
	for i, c := range cells {
		b.WriteString(letter(c))
		if i%pictureWidth == pictureWidth-1 || i == len(cells)-1 {
			b.WriteByte('\n')
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// inspectionSVG draws each image as a field of squares, a colour for each
// build, with a key below.
func inspectionSVG(in snapshot.Inspection) string {
	const cell, left, line = 10, 10, 18
	var b strings.Builder
	y := 0
	text := func(x int, s string) {
		fmt.Fprintf(&b, `<text x="%d" y="%d">%s</text>`+"\n", x, y, html.EscapeString(s))
	}
	for _, img := range in.Images {
		y += 2 * line
		text(left, fmt.Sprintf("%s of %s, generation %d: %s data, %s zeros, %d mappings", img.Part, in.Manifest.Name, img.Generation, mebibytes(img.DataBytes), mebibytes(img.ZeroBytes), img.Mappings))
		y += line / 2
		for i, c := range img.Cells {
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n",
				left+i%pictureWidth*cell, y+i/pictureWidth*cell, cell-1, cell-1, colour(c, len(img.Builds)))
		}
		y += (len(img.Cells) + pictureWidth - 1) / pictureWidth * cell
		for i, build := range img.Builds {
			y += line
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", left, y-cell, cell, cell, colour(i, len(img.Builds)))
			text(left+2*cell, fmt.Sprintf("generation %s: %s used of %s", generationName(build), mebibytes(build.UsedBytes), mebibytes(build.StoredBytes)))
		}
	}
	width, height := 2*left+pictureWidth*cell, y+2*line
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n"+
		`<rect width="100%%" height="100%%" fill="white"/>`+"\n%s</svg>\n", width, height, width, height, b.String())
}

// colour goes round the circle; zeros are pale.
func colour(build, builds int) string {
	if build == snapshot.CellZero {
		return "#e8e8e8"
	}
	return fmt.Sprintf("hsl(%d,65%%,45%%)", 210+360*build/max(builds, 1))
}

package templatebuild

import (
	"context"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/internal/control"
)

// copyScript puts what an archive holds where COPY says: $1 destination, $2
// owner, $3 archive, $4 source (a path or a pattern), $5 mode of files or empty.
// Several sources, or a destination that ends in a slash: a directory. A
// directory's contents are copied, not itself. It runs in the guest, which is
// all that a hostile archive can reach.
const copyScript = makeDirs + `
dest=$1 archive=$3 src=$4 mode=$5
stage=$(mktemp -d /var/tmp/wrenn-copy.XXXXXX)
trap 'rm -rf -- "$stage" "$archive"' EXIT
tar -x -f "$archive" -C "$stage" --no-same-owner --no-same-permissions
rm -f -- "$archive"
chown -R -h -- "$owner" "$stage"
chmod -R u+rwX -- "$stage"
if [ -n "$mode" ]; then find "$stage" -type f -exec chmod -- "$mode" {} +; fi
cd "$stage"
src=${src#./}; src=${src%/}
if [ -z "$src" ] || [ "$src" = . ]; then found=(.)
elif [ -e "$src" ] || [ -L "$src" ]; then found=("$src")
else
  shopt -s globstar dotglob nullglob
  IFS= ; found=($src); unset IFS
fi
if [ ${#found[@]} -eq 0 ]; then echo "COPY: nothing in the uploaded files matches $src" >&2; exit 1; fi
if [ ${#found[@]} -eq 1 ] && [ -d "${found[0]}" ] && [ ! -L "${found[0]}" ]; then
  mk "$dest"; cp -a -- "${found[0]}/." "$dest/"
elif [ ${#found[@]} -eq 1 ] && [ "${dest%/}" = "$dest" ] && [ ! -d "$dest" ]; then
  mk "$(dirname -- "$dest")"; cp -a --no-target-directory -- "${found[0]}" "$dest"
else
  mk "${dest%/}"
  for f in "${found[@]}"; do
    if [ -d "$f" ] && [ ! -L "$f" ]; then cp -a -- "$f/." "$dest/"; else cp -a -- "$f" "$dest/"; fi
  done
fi`

// copy does a COPY.
func (w *worker) copy(ctx context.Context, s Step) error {
	f, err := w.b.files.open(w.template, s.FilesHash)
	if err != nil {
		return control.Invalid("COPY", "the files of %.80s are not here any more; build again", s.Args[0])
	}
	defer f.Close()
	w.copies++
	archive := fmt.Sprintf("/var/tmp/wrenn-files-%d.tar", w.copies)
	if _, err := w.b.opt.Sandboxes.WriteFile(ctx, w.id, control.FileRef{Path: archive, User: "root"}, 0o600, f); err != nil {
		return fmt.Errorf("put the files into the sandbox: %w", err)
	}
	arg := func(i int) string {
		if i < len(s.Args) {
			return s.Args[i]
		}
		return ""
	}
	owner := arg(2)
	if owner == "" {
		owner = w.user() + ":"
	}
	dest := w.absolute(arg(1))
	if d := arg(1); d[len(d)-1] == '/' && dest != "/" {
		dest += "/"
	}
	return w.shell(ctx, copyScript, "root", []string{dest, owner, archive, arg(0), arg(3)})
}

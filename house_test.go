// Package offsetsidecar_test holds the rules of the house that a machine can check: which room may import what
// (ARCHITECTURE.md), what the pure core may not do, and the versions that are pinned.
package offsetsidecar_test

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/offset-sidecar/offset-sidecar"

// room is a row of the table of rooms.
type room struct {
	may   []string // imports beyond the standard library: rooms of ours, or prefixes of modules
	never []string // imports of the standard library that it may not have, directly
	// ground rooms need none of these either through others; what lies behind their own modules is not looked into,
	// except for kmsg, which needs none.
	ground bool
}

const (
	kmsg  = "github.com/twmb/franz-go/pkg/kmsg"
	kerr  = "github.com/twmb/franz-go/pkg/kerr"
	kgo   = "github.com/twmb/franz-go/pkg/kgo"
	kadm  = "github.com/twmb/franz-go/pkg/kadm"
	raft  = "github.com/hashicorp/raft"
	hclog = "github.com/hashicorp/go-hclog"
	uuid  = "github.com/google/uuid"
	sys   = "golang.org/x/sys"
)

var rooms = map[string]room{
	"admin":       {may: []string{"coordinator", "replicate", "tracing"}},
	"proxy":       {may: []string{"proxy/wire", "coordinator", "coordinator/group", "upstream", "tracing", kmsg, kerr, uuid, sys}},
	"proxy/wire":  {may: []string{kmsg, kerr}, never: []string{"net"}, ground: true},
	"coordinator": {may: []string{"coordinator/group", "replicate", "tracing", kmsg, kerr, uuid}, never: []string{"net"}},
	"coordinator/group": {may: []string{kmsg, kerr}, ground: true,
		never: []string{"net", "os", "log", "log/slog", "sync", "sync/atomic", "math/rand", "math/rand/v2", "crypto/rand", "context"}},
	"replicate":       {may: []string{"replicate/store", "tracing", raft, "github.com/klauspost/compress", "github.com/hashicorp/serf", "github.com/hashicorp/memberlist", "github.com/hashicorp/raft-autopilot", hclog, uuid, sys}},
	"replicate/store": {may: []string{"github.com/dgraph-io/badger/v4", raft, sys}, never: []string{"net"}, ground: true},
	"upstream":        {may: []string{"tracing", kgo, kadm, kmsg, kerr}},
	"tracing":         {may: []string{"go.opentelemetry.io/otel", "github.com/prometheus"}},
}

// groundNever is what no ground room may need, however indirectly.
var groundNever = []string{"net", "net/http", "github.com/hashicorp/serf", "go.opentelemetry.io"}

type goPackage struct {
	ImportPath string
	Standard   bool
	Imports    []string
	GoFiles    []string
	Dir        string
}

// listPackages gives all packages of the module and everything they need, by import path, without tests.
func listPackages(t *testing.T) map[string]goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard,Imports,GoFiles,Dir", "./...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]goPackage{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all[p.ImportPath] = p
	}
}

func under(path, prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }

// allowed says whether a room may import a path that is not of the standard library.
func (r room) allowed(path string) bool {
	if name, ours := strings.CutPrefix(path, module+"/"); ours {
		return slices.Contains(r.may, name)
	}
	return slices.ContainsFunc(r.may, func(prefix string) bool { return under(path, prefix) })
}

func TestEachRoomImportsOnlyWhatItsRowAllows(t *testing.T) {
	all := listPackages(t)
	for path, p := range all {
		name, ours := strings.CutPrefix(path, module+"/")
		if !ours || under(name, "cmd") || under(name, "e2e") || under(name, "bench") || under(name, "examples") {
			continue
		}
		r, known := rooms[name]
		if !known {
			t.Errorf("%s is no room: a new one must earn its wall by an import rule", name)
			continue
		}
		for _, imported := range p.Imports {
			if standard := all[imported].Standard || imported == "unsafe" || imported == "C"; standard {
				if slices.Contains(r.never, imported) {
					t.Errorf("%s imports %s", name, imported)
				}
			} else if !r.allowed(imported) {
				t.Errorf("%s imports %s", name, imported)
			}
		}
		if r.ground {
			checkGround(t, all, name, r)
		}
	}
	for name := range rooms {
		if _, there := all[module+"/"+name]; !there {
			t.Errorf("room %s is gone", name)
		}
	}
}

// checkGround looks through everything a ground room needs, up to the modules that its row names.
func checkGround(t *testing.T, all map[string]goPackage, name string, r room) {
	t.Helper()
	seen := map[string]bool{}
	var walk func(path, via string)
	walk = func(path, via string) {
		if seen[path] {
			return
		}
		seen[path] = true
		for _, banned := range groundNever {
			if under(path, banned) {
				t.Errorf("%s needs %s, through %s", name, path, via)
			}
		}
		if strings.HasPrefix(path, module) && path != module+"/"+name {
			t.Errorf("%s needs the room %s, through %s", name, path, via)
		}
		if !all[path].Standard && path != module+"/"+name && !under(path, kmsg) && !under(path, kerr) && r.allowed(path) {
			return
		}
		for _, next := range all[path].Imports {
			walk(next, path)
		}
	}
	walk(module+"/"+name, "itself")
}

func TestNobodyImportsTheProgram(t *testing.T) {
	for path, p := range listPackages(t) {
		for _, imported := range p.Imports {
			if under(imported, module+"/cmd") {
				t.Errorf("%s imports %s", path, imported)
			}
		}
	}
}

func TestNoRoomIsAMiscellany(t *testing.T) {
	for path := range listPackages(t) {
		name, ours := strings.CutPrefix(path, module+"/")
		for _, part := range strings.Split(name, "/") {
			if ours && slices.Contains([]string{"internal", "pkg", "util", "utils", "common", "helpers"}, part) {
				t.Errorf("%s", name)
			}
		}
	}
}

// The core is told the time, the id and the topics. It never asks, and nothing in it runs beside anything else.
func TestTheCoreHasNoClockGoroutineOrChannel(t *testing.T) {
	clock := []string{"Now", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick", "Sleep", "Since", "Until"}
	files, err := filepath.Glob("coordinator/group/*.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			what := ""
			switch n := n.(type) {
			case *ast.GoStmt:
				what = "a goroutine"
			case *ast.ChanType, *ast.SelectStmt, *ast.SendStmt:
				what = "a channel"
			case *ast.UnaryExpr:
				if n.Op == token.ARROW {
					what = "a channel"
				}
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && x.Obj == nil && slices.Contains(clock, n.Sel.Name) {
					what = "time." + n.Sel.Name
				}
			}
			if what != "" {
				t.Errorf("%s: %s", set.Position(n.Pos()), what)
			}
			return true
		})
	}
}

// What is on disk and on the wire depends on these; a new version is a decision, not a side effect.
func TestPinnedVersions(t *testing.T) {
	content, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range []struct {
		path, version string
		optional      bool // needed by clusters of sidecars only
	}{
		{raft, "v1.8.0", false},
		{"github.com/hashicorp/raft-autopilot", "v0.3.0", true},
		{"github.com/hashicorp/serf", "v0.11.0", true},
		{"github.com/dgraph-io/badger/v4", "v4.9.6", false},
		{kmsg, "v1.15.0", false},
		{"github.com/twmb/franz-go/pkg/kfake", "v0.0.0-20260918054303-01f206a7e32c", false},
	} {
		found := regexp.MustCompile(`(?m)^\s*(?:require\s+)?` + regexp.QuoteMeta(pin.path) + ` (\S+)`).FindSubmatch(content)
		switch {
		case found == nil && !pin.optional:
			t.Errorf("%s is not required", pin.path)
		case found != nil && string(found[1]) != pin.version:
			t.Errorf("%s is %s, not %s", pin.path, found[1], pin.version)
		}
	}
	if strings.Contains(string(content), "\nreplace ") {
		t.Error("go.mod replaces a module: 'go install' of the program would fail")
	}
}

// A series that nobody moves would show a zero that means nothing.
func TestEveryMetricIsMovedBySomeRoom(t *testing.T) {
	names, err := os.ReadFile("tracing/names.go")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	err = filepath.WalkDir(".", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || under(path, "tracing") {
			return err
		}
		text, err := os.ReadFile(path)
		source.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	moved := 0
	for _, found := range regexp.MustCompile(`(?m)^\t([A-Z]\w+)\s.*//`).FindAllSubmatch(names, -1) {
		if moved++; !regexp.MustCompile(`\btracing\.` + string(found[1]) + `\b`).MatchString(source.String()) {
			t.Errorf("tracing.%s is used by no room", found[1])
		}
	}
	if moved < 20 {
		t.Errorf("only %d names were found in names.go", moved)
	}
}

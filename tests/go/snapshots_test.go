// Package main runs containerd's own tests of snapshotters, through containerd's own client, on `thinpool snapshotter`.
//
// From the environment: THINPOOL (the command, words parted by blanks), THINPOOL_POOL (the pool), SNAPSHOTTER_SOCKET, and
// SNAPSHOTTER_KILLED (not empty: it is killed and started anew before each case).
package main

import (
	"context"
	"os"
	"os/exec"
	"sort"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

var socket = os.Getenv("SNAPSHOTTER_SOCKET")

// start runs the command and returns when it says that it listens.
func start() (*exec.Cmd, error) {
	words := append(strings.Fields(os.Getenv("THINPOOL")), "snapshotter", "--address", socket)
	command := exec.Command(words[0], words[1:]...)
	command.Stderr = os.Stderr
	said, err := command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := command.Start(); err != nil {
		return nil, err
	}
	_, err = said.Read(make([]byte, 1))
	return command, err
}

func kill(command *exec.Cmd) {
	_ = command.Process.Kill()
	_ = command.Wait()
}

// removeAll takes away what a case has left: the latest first, for children are made after their parents.
func removeAll(snapshotter snapshots.Snapshotter) error {
	ctx := namespaces.WithNamespace(context.Background(), "testsuite")
	var left []snapshots.Info
	if err := snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		left = append(left, info)
		return nil
	}); err != nil {
		return err
	}
	sort.Slice(left, func(a, b int) bool { return left[a].Created.After(left[b].Created) })
	for _, info := range left {
		if err := snapshotter.Remove(ctx, info.Name); err != nil {
			return err
		}
	}
	return nil
}

func TestSnapshotter(t *testing.T) {
	running, err := start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(running) })
	testsuite.SnapshotterSuite(t, "thinpool", func(ctx context.Context, _ string) (snapshots.Snapshotter, func() error, error) {
		if os.Getenv("SNAPSHOTTER_KILLED") != "" {
			kill(running)
			if running, err = start(); err != nil {
				return nil, nil, err
			}
		}
		dialing, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		connection, err := grpc.DialContext(dialing, "unix://"+socket, grpc.WithInsecure(), grpc.WithBlock())
		if err != nil {
			return nil, nil, err
		}
		snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "thinpool")
		return snapshotter, func() error {
			defer connection.Close()
			return removeAll(snapshotter)
		}, nil
	})
}

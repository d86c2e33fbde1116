// Go net/http with Server.Shutdown under start_server, as common articles on graceful restarts recommend.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	since := time.Now().UTC().Format(time.RFC3339)
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "pid %d, generation 1, since %s\n", os.Getpid(), since)
	})
	http.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		// Reads the whole body first, because net/http stops reading it once the response begins.
		body, _ := io.ReadAll(r.Body)
		w.Write(body)
	})
	plain, secure := listen()
	server := &http.Server{}
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	ended := make(chan struct{})
	go func() {
		<-terminated
		server.Shutdown(context.Background())
		close(ended)
	}()
	if secure != nil {
		folder := os.Getenv("CREDENTIALS_DIRECTORY")
		go server.ServeTLS(secure, folder+"/tls.crt", folder+"/tls.key")
	}
	server.Serve(plain)
	<-ended
}

// listen returns the sockets of start_server, as in 127.0.0.1:8080=3;127.0.0.1:8443=4 (the second one is for TLS).
// Without start_server it binds the address in the first argument.
func listen() (plain, secure net.Listener) {
	ports, found := os.LookupEnv("SERVER_STARTER_PORT")
	if !found {
		plain, err := net.Listen("tcp", os.Args[1])
		if err != nil {
			panic(err)
		}
		return plain, nil
	}
	first, second, found := strings.Cut(ports, ";")
	if found {
		secure = inherit(second)
	}
	return inherit(first), secure
}

func inherit(port string) net.Listener {
	place, fd, _ := strings.Cut(port, "=")
	number, err := strconv.Atoi(fd)
	if err != nil {
		panic(err)
	}
	listener, err := net.FileListener(os.NewFile(uintptr(number), place))
	if err != nil {
		panic(err)
	}
	return listener
}

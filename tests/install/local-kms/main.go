// local-kms on loopback: a KMS that others wrote (github.com/nsmithuk/local-kms), for byokd's
// tests. Its own program listens on every address; this one differs in that alone.
//
// Environment: PORT, and KMS_DATA_PATH, KMS_REGION, KMS_ACCOUNT_ID as local-kms reads them.
package main

import (
	"fmt"
	"net/http"
	"os"
	"reflect"
	"strings"

	"github.com/nsmithuk/local-kms/src/config"
	"github.com/nsmithuk/local-kms/src/data"
	"github.com/nsmithuk/local-kms/src/handler"
	log "github.com/sirupsen/logrus"
)

func main() {
	config.AWSAccountId = os.Getenv("KMS_ACCOUNT_ID")
	config.AWSRegion = os.Getenv("KMS_REGION")
	config.DatabasePath = os.Getenv("KMS_DATA_PATH")
	database := data.NewDatabase(config.DatabasePath)
	defer database.Close()
	logger := log.New()
	logger.SetLevel(log.WarnLevel)
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, operation, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
		method := reflect.ValueOf(handler.NewRequestHandler(r, logger, database)).MethodByName(operation)
		if operation == "" || !method.IsValid() {
			w.WriteHeader(http.StatusNotImplemented)
			return
		}
		response := method.Call(nil)[0].Interface().(handler.Response)
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.WriteHeader(response.Code)
		fmt.Fprint(w, response.Body)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
